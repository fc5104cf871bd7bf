-- KEYS: the registry. ARGV: worker, generation, card, ttl in ms, ms the registry outlives its last heartbeat.

local worker, generation, now = ARGV[1], ARGV[2], now_ms()
forget_silent(now, tonumber(ARGV[4]))
redis.call('SET', BORN, now, 'NX')
local known = generation_of(worker)
if not known or not is_newer(known, generation) then
  redis.call('HSET', CARDS, worker, generation .. ' ' .. ARGV[3])
  redis.call('ZADD', HEARD, now, worker)
end
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, ARGV[5])
end
