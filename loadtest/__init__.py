"""Load tests: whole servers under a load that does not wait for them, driven by Locust.

scenario, settings      one YAML file, typed; what a wrong one is told
schedule, replay        when requests are due; recorded traces and the prompts that stand in for theirs
plan, planning          everything a run will send, decided before it starts
locustfile, conductor   the sending process: Locust, and who takes which conversation when
asking                  one streamed answer, timed from the wire
samples                 what the sending process hands back
target, servers         the server under test; servers that are started for a run
scrape                  their `/metrics` meanwhile
session                 one run from scenario to results
results, summary        a run as it is kept, and what it says
series, tables, report  plots, tables, the page
verdict                 exit codes
cli                     `python -m loadtest run | compare | report | plan | scenarios`

Locust's process, which gevent has patched, loads `locustfile`, `conductor`, `asking`, `plan` and `samples` only; the
rest stays in a process of its own.
"""
