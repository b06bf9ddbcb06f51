"""Comparisons of methods: which runs there are, how they are made and kept, and what tables and figures say of them.

`plan` says what is compared, `runs` makes it, `results` keeps it, `bootstrap` and `statistics` compute, `tables`,
`figures` and `page` show. `python -m experiments.reproduce` is the command.
"""
