-- wrk: waits between requests if RATE (requests/s of all CONNECTIONS together) is set, and says at
-- the end what it saw as one line of JSON. A wait is drawn anew each time, or all would go in step.
local rate, connections = tonumber(os.getenv("RATE")), tonumber(os.getenv("CONNECTIONS"))

if rate then
   function delay()
      return math.random() * 2000 * connections / rate -- milliseconds, the mean keeps the rate
   end
end

wrk.path = os.getenv("TARGET") or wrk.path -- absolute-form, for a proxy that must be told

local paths, at = tonumber(os.getenv("PATHS")), 0

if paths then -- as many different targets, one after the other
   function request()
      at = (at + 1) % paths
      return wrk.format(nil, wrk.path .. at)
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '{"requests": %d, "us": %d, "p50": %d, "p99": %d, "refused": %d, "failed": %d}\n',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
