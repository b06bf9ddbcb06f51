"""TensorFlow Datasets: the builder `omnimedvqa`, building it, and reading it back; none of it needs TensorFlow."""
