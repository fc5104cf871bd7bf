-- KEYS: the registry. ARGV: ttl in ms. Returns { BORN or nil, { card, ms since its last heartbeat, ... } }.

local now = now_ms()
local heard = redis.call('ZRANGEBYSCORE', HEARD, '(' .. (now - ARGV[1]), '+inf', 'WITHSCORES')
local reply = {}
for i = 1, #heard, 2 do
  local entry = redis.call('HGET', CARDS, heard[i])
  if entry then
    reply[#reply + 1] = string.match(entry, '^%d+ (.*)$')
    reply[#reply + 1] = now - heard[i + 1]
  end
end
return { redis.call('GET', BORN), reply }
