-- KEYS: the index. ARGV: worker, generation, token, joined page hashes, max_nodes. Returns the token, or nil.

local token, slot = enroll(ARGV[1], ARGV[2], ARGV[3])
local path, max_nodes = ARGV[4], tonumber(ARGV[5])
if not slot or #path == 0 then
  return token
end
local tick = redis.call('HINCRBY', META, 'tick', 1)

-- Cut the edge after `num_upper` pages: the node keeps the upper part, a new one gets the rest if anybody holds it.
local function split(edge, claims, num_upper)
  local lower, is_held = {}, false
  for other, claim in pairs(claims) do
    if claim[NUM_HELD] > num_upper then
      lower[other] = { claim[NUM_HELD] - num_upper, claim[SINCE], claim[SEEN] }
      is_held = true
    end
    claim[NUM_HELD] = math.min(claim[NUM_HELD], num_upper)
  end
  if is_held then
    local id = page(edge, num_upper)
    store(id, string.sub(edge, num_upper * HASH_BYTES + 1), lower)
    touch({ id }, tick)
  end
  return string.sub(edge, 1, num_upper * HASH_BYTES)
end

-- Claim the first pages of an edge now. Returns since when the slot has held all of it.
local function claim_pages(claims, length, pages, since_above)
  local claim = claims[slot]
  if not claim or claim[SEEN] < since_above then
    claim = { 0, tick, tick }
  end
  if claim[NUM_HELD] < length then
    claim[SINCE] = tick
  end
  claim[NUM_HELD] = math.max(claim[NUM_HELD], pages)
  claim[SEEN] = tick
  claims[slot] = claim
  return claim[SINCE]
end

local used, position, since = {}, 0, 0
while position < num_pages(path) do
  local id = page(path, position)
  local edge, new_edge, claims = redis.call('HGET', EDGES, id), nil, nil
  if edge then
    claims = claims_on(id)
  else
    new_edge, claims = string.sub(path, position * HASH_BYTES + 1), {}
    edge = new_edge
  end
  local common = num_common(edge, path, position)
  position = position + common
  if common < num_pages(edge) and position < num_pages(path) then
    new_edge = split(edge, claims, common)
    edge = new_edge
  end
  since = claim_pages(claims, num_pages(edge), common, since)
  store(id, new_edge, claims)
  used[#used + 1] = id
end
touch(used, tick)

local num_extra = redis.call('ZCARD', LRU) - max_nodes
if num_extra > 0 then
  local oldest = redis.call('ZPOPMIN', LRU, num_extra)
  for i = 1, #oldest, 2 do
    delete(oldest[i])
  end
end
return token
