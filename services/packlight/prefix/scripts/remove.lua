-- KEYS: the index. ARGV: worker, generation, token, joined page hashes, keep. Returns the token, or nil.

local token, slot = enroll(ARGV[1], ARGV[2], ARGV[3])
local path, keep = ARGV[4], tonumber(ARGV[5])
if not slot or keep >= num_pages(path) then
  return token
end

local function shorten(id, pages)
  local claims = claims_on(id)
  local claim = claims[slot]
  if not claim or claim[NUM_HELD] <= pages then
    return
  end
  claim[NUM_HELD] = pages
  claims[slot] = pages > 0 and claim or nil
  if next(claims) then
    store(id, nil, claims)
  else
    delete(id)
  end
end

local position = 0
while position <= keep do
  local id = page(path, position)
  local edge = redis.call('HGET', EDGES, id)
  if not edge then
    break
  end
  local common = num_common(edge, path, position)
  if keep < position + common then
    shorten(id, keep - position)
  end
  if common < num_pages(edge) then
    break
  end
  position = position + common
end
return token
