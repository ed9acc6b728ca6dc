"""Coverage-guided fuzzing of every parser, with atheris; `python -m tests.fuzzing --runs N [--target NAME]`."""
