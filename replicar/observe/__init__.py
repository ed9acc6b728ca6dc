"""What operators see of a running part: metrics for Prometheus, and the lines of its log. The same for every part.

`exposition` is the text format, `histogram` what is counted by size, `endpoint` the HTTP end, `process` what every part
says of itself; `logs` sets the log up, as text or as JSON. docs/metrics.md has every metric and what it means.
"""
