-- The radix tree of `prefix/radix.py`, kept in Redis: read that file for the ideas (claims, stamps, slots).
-- Goes in front of every script of this folder. All keys are declared and share one hash tag, so any cluster runs it.
--
--   META    hash   epoch         when this index came to be, by the server's clock
--                  tick, slots   counters
--                  w:<worker>    "<newest known generation> <its slot, 0 after a drop>"
--                  s:<slot>      the worker, while the slot lives
--   EDGES   hash   first page hash of a node -> all page hashes of its edge, joined
--   CLAIMS  hash   first page hash of a node -> { [slot] = { num_held, since, seen } }, as MessagePack
--   LRU     zset   first page hash of a node -> tick of its last use

local META, EDGES, CLAIMS, LRU = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local HASH_BYTES = 16
local NUM_HELD, SINCE, SEEN = 1, 2, 3

-- Page `i` (from 0) of joined hashes.
local function page(hashes, i)
  return string.sub(hashes, i * HASH_BYTES + 1, (i + 1) * HASH_BYTES)
end

local function num_pages(hashes)
  return #hashes / HASH_BYTES
end

-- Generations are compared as text: they may be nanoseconds, which a double does not hold.
local function is_newer(generation, other)
  if #generation ~= #other then
    return #generation > #other
  end
  return generation > other
end

-- A server short of memory may have evicted one of the keys. The others are worthless then: start over, in a new epoch.
local function open_index()
  local epoch = redis.call('HGET', META, 'epoch')
  local num_nodes = redis.call('HLEN', EDGES)
  local is_whole = num_nodes == redis.call('HLEN', CLAIMS) and num_nodes == redis.call('ZCARD', LRU)
  if not epoch or not is_whole then
    redis.call('UNLINK', META, EDGES, CLAIMS, LRU)
    epoch = table.concat(redis.call('TIME'), '.')
    redis.call('HSET', META, 'epoch', epoch)
  end
  return epoch
end

-- The newest known generation of a worker and its slot ('0': none), or nil.
local function life_of(worker)
  local life = redis.call('HGET', META, 'w:' .. worker)
  if life then
    return string.match(life, '^(%d+) (%d+)$')
  end
end

local function set_life(worker, generation, slot)
  redis.call('HSET', META, 'w:' .. worker, generation .. ' ' .. slot)
end

local function drop(worker, generation)
  local known, slot = life_of(worker)
  if known and is_newer(known, generation) then
    return
  end
  if slot then
    redis.call('HDEL', META, 's:' .. slot)
  end
  set_life(worker, generation, '0')
end

-- A token names a set of claims: "<epoch> <slot>". A holder that lost track of its claims sends none and gets a new
-- slot, which ends its old claims. A token that is not the living one belongs to a call that comes too late: nothing
-- is done, and its sender learns the living one.
-- Returns the token (nil: a newer generation is known) and the slot to write under (nil: write nothing).
local function enroll(worker, generation, token)
  local epoch = open_index()
  local known, slot = life_of(worker)
  if known and is_newer(known, generation) then
    return nil, nil
  end
  local is_alive = known == generation and slot ~= '0'
  if is_alive and token ~= '' then
    local living = epoch .. ' ' .. slot
    return living, token == living and tonumber(slot) or nil
  end
  drop(worker, generation)
  slot = redis.call('HINCRBY', META, 'slots', 1)
  set_life(worker, generation, slot)
  redis.call('HSET', META, 's:' .. slot, worker)
  return epoch .. ' ' .. slot, slot
end

local workers = {}

-- The worker of a living slot, or false.
local function worker_of(slot)
  if workers[slot] == nil then
    workers[slot] = redis.call('HGET', META, 's:' .. slot)
  end
  return workers[slot]
end

-- The claims of living slots on a node.
local function claims_on(id)
  local packed = redis.call('HGET', CLAIMS, id)
  local living = {}
  for slot, claim in pairs(packed and cmsgpack.unpack(packed) or {}) do
    if worker_of(slot) then
      living[slot] = claim
    end
  end
  return living
end

local function store(id, edge, claims)
  if edge then
    redis.call('HSET', EDGES, id, edge)
  end
  redis.call('HSET', CLAIMS, id, cmsgpack.pack(claims))
end

local function delete(id)
  redis.call('HDEL', EDGES, id)
  redis.call('HDEL', CLAIMS, id)
  redis.call('ZREM', LRU, id)
end

-- How many pages of `edge` the path follows from page `start` on, which is the edge's first. Hashes are chained: equal
-- at one page means equal at all before it.
local function num_common(edge, path, start)
  local low, high = 1, math.min(num_pages(edge), num_pages(path) - start)
  if page(edge, high - 1) == page(path, start + high - 1) then
    return high
  end
  while high - low > 1 do -- equal at page low - 1, different at page high - 1
    local middle = math.floor((low + high) / 2)
    if page(edge, middle - 1) == page(path, start + middle - 1) then
      low = middle
    else
      high = middle
    end
  end
  return low
end

local function touch(ids, tick)
  for _, id in ipairs(ids) do
    redis.call('ZADD', LRU, tick, id)
  end
end
