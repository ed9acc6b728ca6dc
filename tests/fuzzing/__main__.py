"""`python -m tests.fuzzing --runs N [--target NAME] [--keep]`: fuzz one target, or each in a process of its own.

A run begins with the golden files and the kept corpus (`corpus`). With `--keep`, which is how `make fuzz` calls it,
what reaches something new is added to that, and belongs into the next commit. An input that breaks a parser is left as
`crash-*` where the command runs; once the parser is mended, `--add FILE` puts it into the corpus of `--target`: the
tests feed it for ever.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzzing import corpus


def _fuzz(target: str, runs: int, seed: int, fresh: Path) -> None:
    """Fuzz in this process, which ends with it; inputs that reach something new are left in `fresh`."""
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

    with atheris.instrument_imports(include=["replicar"]):
        from tests.fuzzing import targets

    with tempfile.TemporaryDirectory() as scratch:
        for number, data in enumerate([*targets.seeds(target), *corpus.kept(target)]):
            (Path(scratch) / str(number)).write_bytes(data)
        arguments = [sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-max_len=262144", "-rss_limit_mb=2048"]
        atheris.Setup([*arguments, "-timeout=20", str(fresh), scratch], lambda data: targets.feed(target, data))
        atheris.Fuzz()


def _one(target: str, runs: int, seed: int, *, keeps: bool) -> bool:
    """Fuzz in a process of its own; whether nothing but declared errors came."""
    print(f"{target}: {runs} inputs", flush=True)
    with tempfile.TemporaryDirectory() as fresh:
        command = [sys.executable, "-m", "tests.fuzzing", "--target", target, "--runs", str(runs), "--seed", str(seed)]
        done = subprocess.run([*command, "--fresh", fresh], capture_output=True, text=True, check=False)
        print("  " + "\n  ".join(done.stderr.strip().splitlines()[-2:]), flush=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        elif keeps:
            print(f"  {corpus.keep(target, [path.read_bytes() for path in Path(fresh).iterdir()])} inputs are kept")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target (%(default)s)")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's own randomness (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="add inputs that reach something new to the corpus")
    parser.add_argument("--add", type=Path, help="put this input into the corpus of --target, and fuzz nothing")
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.add is not None:
        if options.target is None:
            parser.error("--add wants a --target")
        corpus.keep(options.target, [options.add.read_bytes()])
        return 0
    if options.fresh is not None:
        _fuzz(options.target, options.runs, options.seed, options.fresh)
        return 0
    from tests.fuzzing.targets import TARGETS

    names = [options.target] if options.target is not None else list(TARGETS)
    failed = [name for name in names if not _one(name, options.runs, options.seed, keeps=options.keep)]
    print(f"failed: {', '.join(failed)}" if failed else "nothing but declared errors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
