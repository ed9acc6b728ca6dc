"""`python -m tests.fuzzing --runs N [--target NAME]`: fuzz one target, or each in a process of its own.

The corpus begins with the golden files and what lies in `corpus/`; what a run finds new is kept in a directory that is
given, or thrown away. An input that breaks a parser is left as `crash-*` where the command runs, and belongs into
`corpus/` once the parser is mended: the tests feed it for ever.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def _fuzz(target: str, runs: int, seed: int, keep: Path | None) -> None:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with atheris.instrument_imports(include=["replicar"]):
        from tests.fuzzing import targets

    with tempfile.TemporaryDirectory() as scratch:
        begins = Path(scratch) / "seeds"
        begins.mkdir()
        for number, data in enumerate(targets.seeds(target)):
            (begins / str(number)).write_bytes(data)
        places = [str(keep)] if keep is not None else []
        places += [str(begins), *([str(CORPUS / target)] if (CORPUS / target).is_dir() else [])]
        arguments = [sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-max_len=262144", "-rss_limit_mb=2048"]
        atheris.Setup([*arguments, "-timeout=20", *places], lambda data: targets.feed(target, data))
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target (%(default)s)")
    parser.add_argument("--target", help="only this one, in this process")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's own randomness (%(default)s)")
    parser.add_argument("--keep", type=Path, help="a directory for inputs that reach something new")
    options = parser.parse_args()
    if options.target is not None:
        _fuzz(options.target, options.runs, options.seed, options.keep)
        return 0
    failed = []
    from tests.fuzzing.targets import TARGETS

    for name in TARGETS:
        print(f"{name}: {options.runs} inputs", flush=True)
        command = [sys.executable, "-m", "tests.fuzzing", "--target", name, "--runs", str(options.runs)]
        done = subprocess.run([*command, "--seed", str(options.seed)], capture_output=True, text=True, check=False)
        print("  " + "\n  ".join(done.stderr.strip().splitlines()[-2:]), flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    print(f"failed: {', '.join(failed)}" if failed else "nothing but declared errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
