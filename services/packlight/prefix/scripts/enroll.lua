-- KEYS: the index. ARGV: worker, generation, token, seconds the index outlives its last heartbeat (a model that was
-- retired must not stay for ever). Returns the token, or nil.

local token = enroll(ARGV[1], ARGV[2], ARGV[3])
for _, key in ipairs(KEYS) do
  redis.call('EXPIRE', key, ARGV[4])
end
return token
