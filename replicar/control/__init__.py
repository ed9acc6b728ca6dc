"""How a part speaks to the config server: its identity, the messages, the client, and enrolment.

`identity` is who a part is (a directory), `enrolment` how it becomes that; `messages` and `admission` are the API's
contract as models, `client` is the typed client over mutual TLS and `transport` what lies below it; `proofs` is the
arithmetic of enrolment, `files` keeps small secret files durably.
"""
