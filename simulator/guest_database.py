"""The database of the guest: SQLite with its own transactions and fsyncs, on the guest's disk.

Debian's `sqlite3` and the libraries that it loads lie on the disk itself, so what runs after a recovery was recovered,
too. One process has the database open and is fed statement by statement; it answers when the commit is durable
(`synchronous=FULL`, a write-ahead log that is checkpointed all the time). Only then the script prints the row.

Each row has random bytes and a digest of them *and of the row before*, so a digest that the line has printed vouches
for every row up to there. In the same transaction a second table is told how many rows there are. At boot, before
anything is written, SQLite's integrity check, the chain and that count have to hold, else the guest says `damaged`.

    kept N             rows found, all of them as they were written
    found N DIGEST     every eighth of them, and the last eight
    record N DIGEST    a row that is committed
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError

PROGRAM: Final = "sqlite3"
#: What a row holds, besides its number and digest.
ROW_BYTES: Final = 4096

_SETTINGS: Final = """\
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA wal_autocheckpoint = 24;
"""
_BEGIN: Final = """\
CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, body BLOB NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
INSERT OR IGNORE INTO totals VALUES ('records', 0);
PRAGMA integrity_check;
SELECT CASE WHEN (SELECT count(*) FROM records) = (SELECT number FROM totals)
        AND (SELECT coalesce(max(number), 0) FROM records) = (SELECT number FROM totals)
        AND NOT EXISTS (SELECT 1 FROM records AS this LEFT JOIN records AS one ON one.number = this.number - 1
            WHERE this.digest != lower(hex(sha3(coalesce(one.digest, '') || hex(this.body), 256))))
    THEN 'sound' ELSE 'unsound' END;
SELECT 'found ' || number || ' ' || digest FROM records
    WHERE number % 8 = 0 OR number > (SELECT number FROM totals) - 8;
SELECT 'kept ' || number FROM totals;
"""
#: One row, number $number; the body is drawn once and used twice.
_ROW: Final = """\
BEGIN IMMEDIATE;
INSERT INTO records SELECT $number, body, lower(hex(sha3(
    coalesce((SELECT digest FROM records WHERE number = $number - 1), '') || hex(body), 256)))
    FROM (SELECT randomblob($bytes) AS body LIMIT 1);
UPDATE totals SET number = $number;
COMMIT;
SELECT 'record ' || number || ' ' || digest FROM records WHERE number = $number;
"""

#: The part of the guest's script that works: it leaves when it reads `quit`.
SCRIPT: Final = f"""\
mkfifo /asked /answered
chroot /disk /usr/bin/{PROGRAM} -batch /rows.db </asked >/answered 2>&1 &
exec 3>/asked 4</answered
cat >&3 <<'END'
{_SETTINGS}{_BEGIN}END
verdict=; number=; bytes={ROW_BYTES}
while [ -z "$number" ] && read line <&4; do
    case $line in
        wal|ok|sound|unsound) verdict="$verdict $line" ;;
        [0-9]*) ;;  # what a setting is now
        kept*) number=${{line#kept }} ;;
        found*) echo "$line" ;;
        *) echo "said: $line" ;;
    esac
done
[ "$verdict" = " wal ok sound" ] || {{ echo "damaged:$verdict"; poweroff -f; }}
echo "kept $number"
while ! read -t 0.05 line || [ "$line" != quit ]; do
    number=$((number + 1))
    cat >&3 <<END
{_ROW}END
    read line <&4; echo "$line"
done
exec 3>&-; wait
"""


def put(root: Path) -> None:
    """SQLite and what it loads, below the root of a disk.

    Raises:
        PermanentError: it is not installed, or can't say what it loads.
    """
    program = shutil.which(PROGRAM, path="/usr/bin:/bin")
    if program is None:
        raise PermanentError(f"there is no {PROGRAM} here", hint="`make setup` as root installs it")
    said = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=60, check=True).stdout
    for name in [program, *re.findall(r"(/\S+) \(0x", said)]:
        place = root / name.removeprefix("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, place)
