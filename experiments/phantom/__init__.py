"""How the embedded benchmark's models were made: what they are taught, their training, and what came out.

`corpus` and `folder` make training data and side files, `recipes` says how each model is made. The commands are
`python -m experiments.phantom.draw`, `.pretrain` and `.measure`; docs/data.md explains.
"""
