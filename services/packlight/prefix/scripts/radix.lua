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
local BATCH = 1000 -- an even number: scores and members come in pairs

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

-- Calls `command(first, last)` for the numbers 1 to `count`, some at a time: a command takes only so many arguments.
local function in_batches(count, command)
  for first = 1, count, BATCH do
    command(first, math.min(first + BATCH - 1, count))
  end
end

local workers = {} -- slot -> its worker, false if it is dead; of the slots met so far

-- Everything everybody holds is claimed by every worker of the fleet, so slots are looked up together.
local function learn_workers(claims)
  local slots, names = {}, {}
  for slot in pairs(claims) do
    if workers[slot] == nil then
      slots[#slots + 1] = slot
      names[#names + 1] = 's:' .. slot
    end
  end
  in_batches(#names, function(first, last)
    local found = redis.call('HMGET', META, unpack(names, first, last))
    for i = first, last do
      workers[slots[i]] = found[i - first + 1]
    end
  end)
end

-- The claims of living slots on a node.
local function claims_on(id)
  local packed = redis.call('HGET', CLAIMS, id)
  local claims = packed and cmsgpack.unpack(packed) or {}
  learn_workers(claims)
  for slot in pairs(claims) do
    if not workers[slot] then
      claims[slot] = nil
    end
  end
  return claims
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
  local scored = {}
  for i, id in ipairs(ids) do
    scored[2 * i - 1], scored[2 * i] = tick, id
  end
  in_batches(#scored, function(first, last)
    redis.call('ZADD', LRU, unpack(scored, first, last))
  end)
end
