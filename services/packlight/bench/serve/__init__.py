"""Whole servers side by side, measured from where their clients stand.

answers, results, figures    one answer and its durations; a run and its JSON; what its rounds say
prompts, workloads           what is asked, in exact numbers of tokens
targets, loads               who is asked, and when
stream, client               asking and timing
turn, rounds                 one server's turn; turns in rotating order
gauge, pause                 a server's memory while it is measured; the others' processes meanwhile
flags, tables, plots          the command line; what people see
command                      the run itself
"""
