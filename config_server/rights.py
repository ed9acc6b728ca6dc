"""Who may do what: roles by what they are let do, said once for all routes."""

from __future__ import annotations

from typing import Final

from replicar.control.identity import Role

#: Look at everything but keys; auditors see those as well, since they verify what is stored.
PEOPLE: Final = frozenset({Role.READER, Role.AUDITOR, Role.OPERATOR, Role.ADMIN})
#: The same, and what recovery workers look at for their work.
READERS: Final = PEOPLE | {Role.RECOVERY}
#: Change things.
OPERATORS: Final = frozenset({Role.OPERATOR, Role.ADMIN})
#: Let others in.
ADMINS: Final = frozenset({Role.ADMIN})
#: Carry out jobs; an operator's command may do a worker's work itself, on a host that has none.
WORKERS: Final = OPERATORS | {Role.RECOVERY}
#: Are given machines' keys; who was is audited.
KEYS: Final = OPERATORS | {Role.RECOVERY, Role.AUDITOR}
