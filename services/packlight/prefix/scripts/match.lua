-- KEYS: the index. ARGV: joined page hashes. Returns { worker, number of leading pages it holds, ... }.

local path = ARGV[1]
local num_held, used = {}, {}
local reach -- slot -> since when it has held all pages so far; nil at the root
local position = 0

while position < num_pages(path) do
  local id = page(path, position)
  local edge = redis.call('HGET', EDGES, id)
  if not edge then
    break
  end
  local common, length = num_common(edge, path, position), num_pages(edge)
  local reach_below, is_held = {}, false
  for slot, claim in pairs(claims_on(id)) do
    local since = reach == nil and 0 or reach[slot]
    if since and claim[SEEN] >= since then
      is_held = true
      num_held[slot] = position + math.min(claim[NUM_HELD], common)
      reach_below[slot] = claim[NUM_HELD] == length and claim[SINCE] or nil
    end
  end
  if is_held then
    used[#used + 1] = id
  end
  if not is_held or common < length then
    break
  end
  reach, position = reach_below, position + common
end

if #used > 0 then
  touch(used, redis.call('HINCRBY', META, 'tick', 1))
end
local reply = {}
for slot, pages in pairs(num_held) do
  reply[#reply + 1] = workers[slot]
  reply[#reply + 1] = pages
end
return reply
