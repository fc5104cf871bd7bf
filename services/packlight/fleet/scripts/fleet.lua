-- The registry of live workers. Goes in front of every script of this folder. All keys share one hash tag. Time is the
-- server's own, so that the clocks of the hosts need not agree.
--
--   CARDS  hash   worker -> "<generation> <card>" (see `fleet/card.py`)
--   HEARD  zset   worker -> time of its last heartbeat, in ms
--   BORN   string when this registry came to be, in ms

local CARDS, HEARD, BORN = KEYS[1], KEYS[2], KEYS[3]

local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Generations are compared as text: they may be nanoseconds, which a double does not hold.
local function is_newer(generation, other)
  if #generation ~= #other then
    return #generation > #other
  end
  return generation > other
end

-- The newest generation heard of since the worker last fell silent, or nil.
local function generation_of(worker)
  local entry = redis.call('HGET', CARDS, worker)
  return entry and string.match(entry, '^%d+')
end

local function forget(worker)
  redis.call('HDEL', CARDS, worker)
  redis.call('ZREM', HEARD, worker)
end

local function forget_silent(now, ttl_ms)
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', HEARD, '-inf', now - ttl_ms)) do
    forget(worker)
  end
end
