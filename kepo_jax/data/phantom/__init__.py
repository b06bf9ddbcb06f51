"""PhantomVQA: the embedded benchmark, drawn from scratch in eight modality styles."""
