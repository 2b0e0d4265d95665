#!/usr/bin/env bash
#
# Measure MetricStream systematically, in two parts: they show where it bends, and why it is fast.
#
#     ./performance_test.sh            the load curve: how much this server takes on this machine
#     ./performance_test.sh journey    the journey: what each of its designs is worth here
#
#     PORT=8080 ./performance_test.sh             measure a running server (with --rate-limit 0)
#     SECONDS_PER_STEP=10 ./performance_test.sh   measure longer at each step (default: 3)
#     PYTHON=python3.13t ./performance_test.sh    run server and load tester with this Python
#     TMPDIR=/mnt/disk ./performance_test.sh journey    keep the log of the run on this disk
#
# The load curve begins with an open model: requests are due at fixed times, whatever the server
# does, and latency counts from those times. At its *knee* requests come faster than they are
# served: the queue grows, p99 jumps, and success falls below 100 % (a request that could not be
# sent in time is a failure). There the table ends; run a server well below. The other tables are
# closed models: each client sends when it is answered, so they show the most that so many clients
# can get. Bars stand for requests/s, with batches for metrics/s, each table scaled to its maximum.
#
# The journey is today's server with other options in each phase, which removes one bottleneck of
# the phase before; the factor says what that was worth here. Where `fsync` costs little (a log in
# memory, a fast disk), the first phases are no bottleneck. Tester and server share the cores.
#
# Each run writes performance_results.txt (beside this file) anew, whichever part it measured, and
# only when it is complete. Nothing else stays: the server takes a free port, logs into a temporary
# folder (1 GB at the default length) and is ended by its process id. Exit status 0: all was
# measured, and no request failed except in the search for the knee.

set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
seconds=${SECONDS_PER_STEP:-3}
port=${PORT:-}

RATES=(100 500 1000 2000 2500 5000 10000 15000 20000 25000 30000 40000 50000)  # requests/s
P99_LIMIT_MS=100
BAR_WIDTH=30

fail() {
  printf 'performance_test.sh: %s\n' "$*" >&2
  exit 1
}

# --- The server, and the end of everything -------------------------------------------------------

scratch=$(mktemp -d)
server_pid=

end_server() {
  [[ $server_pid ]] || return 0
  kill "$server_pid" 2>/dev/null || true
  wait "$server_pid" || true
  server_pid=
}

clean_up() {
  trap '' INT TERM HUP
  end_server
  rm -rf -- "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Start a server with these options, an empty log and a free port, and wait until it listens.
start_server() {
  rm -rf -- "$scratch/log"
  mkdir -- "$scratch/log"
  : >"$scratch/started"
  "$python" "$here/metricstream.py" 0 --data-dir "$scratch/log" "$@" \
    >"$scratch/started" 2>"$scratch/errors" &
  server_pid=$!
  for _ in {1..100}; do
    if [[ $(<"$scratch/started") =~ http://[^\ ]*:([0-9]+) ]]; then
      port=${BASH_REMATCH[1]}
      return
    fi
    kill -0 "$server_pid" 2>/dev/null || break
    sleep 0.1
  done
  cat -- "$scratch/errors" >&2
  fail "the server did not start with: $*"
}

# --- One measurement -----------------------------------------------------------------------------

# What a table needs of load_test.py's JSON, as one line: `|` between the fields. Success counts
# the requests that were due, sent or not, and is rounded down: only 100 is 100.
FIGURES='
import json, math, sys
path, status, p99_limit_ms = sys.argv[1:]
figures = json.load(open(path))
latency_ms = figures["latency_ms"]
due = figures["total"] + figures["unsent"]
success = math.floor(figures["successful"] / max(due, 1) * 1e4) / 100
flaws = [f"{figures[what]} {what}" for what in ("failed", "unsent", "lost") if figures[what]]
if status != "0" and not flaws:
    flaws = [figures["audit"]]
p99_ms = latency_ms.get("p99", latency_ms.get("max", math.inf))  # the maximum of a small sample
steady = status == "0" and p99_ms <= float(p99_limit_ms)
print(round(figures["accepted_per_second"]), round(figures["metrics_per_second"]), f"{success:g}",
      latency_ms.get("p50", "-"), latency_ms.get("p99", "-"), "yes" if steady else "no",
      ", ".join(flaws), sep="|")
'

rows=()  # of the table at work: label|got|metrics|success|p50|p99|flaws
flawed=no

# Run load_test.py with these arguments and add a row with this label.
measure() {
  local label=$1 status=0 figures
  shift
  [[ ! -t 2 ]] || printf '\r\033[Kmeasuring: %s …' "$label" >&2
  "$python" "$here/load_test.py" "$port" "$@" --duration "$seconds" --json --quiet \
    >"$scratch/figures" || status=$?
  [[ ! -t 2 ]] || printf '\r\033[K' >&2
  ((status != 130)) || exit 130
  [[ -s $scratch/figures ]] || fail "could not measure: $label"
  figures=$("$python" -c "$FIGURES" "$scratch/figures" "$status" "$P99_LIMIT_MS")
  IFS='|' read -r got metrics success p50 p99 steady flaws <<<"$figures"
  rows+=("$label|$got|$metrics|$success|$p50|$p99|$flaws")
  # Only the search for the knee may ask for more than the server can take; none may lose metrics.
  [[ -z $flaws || ("$*" == *--rate* && $flaws != *lost*) ]] || flawed=yes
}

# --- Tables --------------------------------------------------------------------------------------

report() { tee -a -- "$scratch/report"; }

# Print the row whose field number $1 is the largest.
top_row() { printf '%s\n' "${rows[@]}" | sort -t '|' -n -k "$1,$1" | tail -n 1; }

# Set `bar` for the value $1 on a scale that ends at $2, with the flaws $3 beside it.
set_bar() {
  printf -v bar '%*s' $(($2 ? ($1 * BAR_WIDTH + $2 - 1) / $2 : 0)) ''
  bar=${bar// /#}${3:+  $3}
}

report_heading() {
  local commit
  commit=$(git -C "$here" rev-parse --short HEAD 2>/dev/null) || commit=unknown
  [[ -z $(git -C "$here" status --porcelain -uno 2>/dev/null) ]] || commit+=' with changes'
  printf 'MetricStream: %s\n%s, %s, %s cores, commit %s\n%s s a step, %s\n' "$1" \
    "$(date '+%Y-%m-%d %H:%M %z')" "$("$python" --version)" "$(nproc)" "$commit" "$seconds" "$2" |
    report
}

# Report the rows as a table; the bars show field 2 (requests/s) or 3 (metrics/s).
report_table() {
  local row values most
  most=$(top_row "$2" | cut -d '|' -f "$2")
  {
    printf '\n%-24s %7s %10s %9s %9s %9s\n' "$1" got/s metrics/s success% p50_ms p99_ms
    for row in "${rows[@]}"; do
      IFS='|' read -ra values <<<"$row"
      set_bar "${values[$2 - 1]}" "$most" "${values[6]:-}"
      printf '%-24s %7s %10s %9s %9s %9s  %s\n' "${values[@]:0:6}" "$bar"
    done
  } | report
  rows=()
}

# --- Part 1: the load curve ----------------------------------------------------------------------

load_curve() {
  local rate knee='' clients connection arguments batch label fastest
  if [[ $port ]]; then
    report_heading 'load curve' "the server that runs on port $port"
  else
    start_server --rate-limit 0
    report_heading 'load curve' 'a server with --rate-limit 0'
  fi

  for rate in "${RATES[@]}"; do
    measure "$rate" 50 --rate "$rate"
    [[ $steady == yes ]] || break
    knee="$rate requests/s (100 %, p99 $p99 ms)"
  done
  report_table 'requests/s wanted' 2
  if [[ $steady == yes ]]; then
    printf 'No knee up to %s.\n' "$knee"
  else
    printf 'The knee: %s; at %s requests/s success is %s %% and p99 %s ms.\n' \
      "${knee:-below the first step}" "$rate" "$success" "$p99"
  fi | report

  for clients in 20 50 100 500; do
    for connection in keep-alive --close; do
      arguments=("$clients")
      [[ $connection == keep-alive ]] || arguments+=("$connection")
      measure "$clients clients, $connection" "${arguments[@]}"
    done
  done
  IFS='|' read -r label fastest _ <<<"$(top_row 2)"
  report_table 'flat out' 2
  printf 'The maximum flat out: %s requests/s (%s).\n' "$fastest" "$label" | report

  for batch in 1 10 100 1000; do
    measure "$batch metrics a request" 50 --batch "$batch"
  done
  report_table 'flat out, 50 clients' 3
}

# --- Part 2: the journey -------------------------------------------------------------------------

STRIPES='--rate-limit 1000000 --stripes'  # a limit that is checked but never reached
THREAD_EACH='--threads 0 --durability'
PHASES=(  # label|options of the server|arguments of load_test.py
  "one request at a time, an fsync each|$THREAD_EACH disk $STRIPES 1|1 --close"
  "concurrent requests, fsyncs shared (group commit)|$THREAD_EACH disk $STRIPES 1|50 --close"
  "writes off the request path|$THREAD_EACH memory $STRIPES 1|50 --close"
  "lock stripes instead of one lock|$THREAD_EACH memory $STRIPES 64|50 --close"
  "kept-alive connections|$THREAD_EACH memory $STRIPES 64|50"
  "few threads over parked connections|--durability memory $STRIPES 64|50"
  "and durable again: written before the answer|--durability os $STRIPES 64|50"
)

journey() {
  local phase label options arguments row values most first='' previous='' factor number=0
  [[ -z $port ]] || fail 'the journey starts servers of its own: run it without PORT'
  report_heading 'the journey' "log on $(df --output=source,fstype -- "$scratch" | tail -n 1 | tr -s ' ')"
  for phase in "${PHASES[@]}"; do
    IFS='|' read -r label options arguments <<<"$phase"
    IFS=' ' read -ra options <<<"$options"
    IFS=' ' read -ra arguments <<<"$arguments"
    start_server "${options[@]}"
    measure "$label" "${arguments[@]}"
    end_server
    ((got > 0)) || fail "no request succeeded in the phase: $label"
  done
  most=$(top_row 2 | cut -d '|' -f 2)
  {
    printf '\n%-52s %10s %9s %7s\n' phase requests/s p99_ms factor
    for row in "${rows[@]}"; do
      IFS='|' read -ra values <<<"$row"
      factor=$((values[1] * 100 / ${previous:-${values[1]}}))
      set_bar "${values[1]}" "$most" "${values[6]:-}"
      printf '%-52s %10s %9s %4d.%02d  %s\n' "$((++number)) ${values[0]}" "${values[1]}" \
        "${values[5]}" $((factor / 100)) $((factor % 100)) "$bar"
      previous=${values[1]}
      first=${first:-$previous}
    done
    printf 'From %s to %s requests/s: times %s.\n' "$first" "$previous" $((previous / first))
    printf '\nEach phase is one server and one run of load_test.py:\n'
    number=0
    for phase in "${PHASES[@]}"; do
      IFS='|' read -r _ options arguments <<<"$phase"
      printf '%d  metricstream.py %s\n' $((++number)) "$options"
      printf '   load_test.py PORT %s\n' "$arguments"
    done
  } | report
}

# --- The run -------------------------------------------------------------------------------------

case "$*" in
  '') load_curve ;;
  journey) journey ;;
  *) fail 'the only argument is: journey (see the head of this file)' ;;
esac
cp -- "$scratch/report" "$here/performance_results.txt"
[[ $flawed == no ]] || fail 'requests failed: see the last column'
