-- KEYS: the registry. ARGV: worker, generation.

local known = generation_of(ARGV[1])
if known and not is_newer(known, ARGV[2]) then
  forget(ARGV[1])
end
