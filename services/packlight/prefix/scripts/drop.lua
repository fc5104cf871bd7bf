-- KEYS: the index. ARGV: worker, generation.

open_index()
drop(ARGV[1], ARGV[2])
