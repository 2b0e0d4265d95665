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
# Each run writes performance_results.txt (beside this file) anew, whichever part it measured, and
# only when it is complete. Nothing else stays: the server takes a free port, logs into a temporary
# folder (1 GB at the default length) and is ended by its process id. Exit status 0: all was
# measured, and no request failed except in the search for the knee.
#
# --- The journey ---
#
# The project began at about 200 requests/s, and the goal was 10,000. Each phase removes the
# bottleneck of the phase before. Today's server can run as it was in each phase, with other
# options; the factor says what the phase is worth here. Where an fsync costs little (a log in
# memory, a fast disk), the first phases are no bottleneck. Tester and server share the cores.
#
# What was learnt:
#
# - Threads were the bottleneck, twice. A thread for each connection costs its start (phase 5 ends
#   that), and then 50 threads compete for one interpreter lock (phase 6 ends that). One thread that
#   never waits for a client does three times as much as fifty that do, with a fifth of the p99.
# - An fsync is dear for one request and cheap for fifty that share it. With a fast disk the first
#   two phases are close, on a slow one they are far apart. With 50 kept-alive clients, durability
#   `disk` reached 19,700 requests/s where `os` reached 29,800 (measured in turn).
# - Lock stripes did not help: three runs gave factors of 1.05, 1.09 and 0.95, which is noise. Under
#   the interpreter lock two clients rarely meet in the limiter. The stripes are for Pythons without
#   that lock, and they keep a flush from stopping everybody.
# - Nor did a second thread for the writes (`memory`) instead of writing at once (`os`): 0.94 to
#   1.07, noise too. A write into the page cache takes 1 µs, as long as waking a thread.
# - Reading 16 KiB at a time instead of 64, turning the garbage collector off, and not re-arming
#   epoll changed nothing.
# - Then Python itself. With one thread, what counts is the time that a request takes. The plain way
#   takes 64 µs of user time: 10 for the head, 18 for JSON, 4 for validation, the rest for lines and
#   bookkeeping. The requests/s, with wrk:
#     12,600  the plain way
#     41,000  a memo of heads (10 -> 1.5 µs a request) and one regular expression for metrics of the
#             usual shape (26 -> 3.4 µs a body), because clients repeat themselves
#     44,900  the answers of a round are sent together, so that a client with 50 connections is
#             woken once (system time 9.8 -> 7.0 µs)
#     51,300  a simpler pattern, answers rendered once a second, a round claimed under one lock
#     54,100  no second look at an empty buffer
#   Tests compare the memos and the pattern with the plain way, on thousands of generated and
#   damaged requests.
#
# The record is of two cores, CPython 3.11 and three tagged metrics a request.

set -euo pipefail

STRIPES='--rate-limit 1000000 --stripes'  # a limit that is checked but never reached
THREADS='--threads 0 --durability'  # 0: a thread for each connection
# label|options of the server|arguments of load_test.py|on record: requests/s|p99 in ms
PHASES=(
  "one request at a time, an fsync each|$THREADS disk $STRIPES 1|1 --close|1691|0.8"
  "concurrent requests, fsyncs shared (group commit)|$THREADS disk $STRIPES 1|50 --close|2251|27.3"
  "writes off the request path|$THREADS memory $STRIPES 1|50 --close|3249|18.9"
  "lock stripes instead of one lock|$THREADS memory $STRIPES 64|50 --close|3081|33.4"
  "kept-alive connections|$THREADS memory $STRIPES 64|50|12410|15.0"
  "few threads over parked connections|--durability memory $STRIPES 64|50|37282|2.8"
  "and durable again: written before the answer|--durability os $STRIPES 64|50|39791|2.2"
)
RATES=(100 500 1000 2000 2500 5000 10000 15000 20000 25000 30000 40000 50000)  # requests/s

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
seconds=${SECONDS_PER_STEP:-3}
port=${PORT:-}

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

# --- Measurements, and the tables made of them ---------------------------------------------------

flawed=no

# Run load_test.py with these arguments; collect its figures under this label, as a line of JSON.
measure() {
  local label=$1 status=0
  shift
  [[ ! -t 2 ]] || printf '\r\033[Kmeasuring: %s …' "$label" >&2
  "$python" "$here/load_test.py" "$port" "$@" --duration "$seconds" --json --quiet \
    >"$scratch/figures" || status=$?
  [[ ! -t 2 ]] || printf '\r\033[K' >&2
  ((status != 130)) || exit 130
  [[ -s $scratch/figures ]] || fail "could not measure: $label"
  printf '{"label": "%s", "status": %d, "figures": %s}\n' \
    "$label" "$status" "$(<"$scratch/figures")" >>"$scratch/runs"
}

# Print a table of the collected runs, and what follows from it; fail if requests failed. With
# `answered` or `steady` print nothing; fail if the last run had no success, or was too much.
table() {
  "$python" - "$scratch/runs" "$@" <<'PYTHON'
import json, math, sys

P99_LIMIT_MS = 100
BAR_WIDTH = 30


def row_of(label, status, figures):
    """Return what the tables need of a run.

    Success counts the requests that were due, sent or not. It is rounded down: only 100 is 100.
    """
    latency_ms = figures["latency_ms"]
    due = figures["total"] + figures["unsent"]
    flaws = [f"{figures[what]} {what}" for what in ("failed", "unsent", "lost") if figures[what]]
    p99_ms = latency_ms.get("p99", latency_ms.get("max", math.inf))  # maximum of a small sample
    return {
        "label": label,
        "got": round(figures["accepted_per_second"]),
        "metrics": round(figures["metrics_per_second"]),
        "success": f"{math.floor(figures['successful'] / max(due, 1) * 1e4) / 100:g}",
        "p50": latency_ms.get("p50", "-"),
        "p99": latency_ms.get("p99", "-"),
        "flaws": ", ".join(flaws) or (figures["audit"] if status else ""),
        # The search for the knee may ask for too much; no run may lose metrics.
        "failed": status != 0 and (figures["model"] == "closed" or bool(figures["lost"])),
        "steady": status == 0 and p99_ms <= P99_LIMIT_MS,
    }


def print_rows(head, template, rows, scale):
    print("\n" + head)
    most = max(row[scale] for row in rows) or 1
    for row in rows:
        bar = "#" * math.ceil(row[scale] * BAR_WIDTH / most)
        flaws = "  " + row["flaws"] if row["flaws"] else ""
        print(template.format_map(row) + "  " + bar + flaws)


def print_load(title, rows, scale="got"):
    head = f"{title:<24} {'got/s':>7} {'metrics/s':>10} {'success%':>9} {'p50_ms':>9} {'p99_ms':>9}"
    template = "{label:<24} {got:>7} {metrics:>10} {success:>9} {p50:>9} {p99:>9}"
    print_rows(head, template, rows, scale)


def print_knee(rows):
    print_load("requests/s wanted", rows)
    steady = [row for row in rows if row["steady"]]
    step = "{label} requests/s (100 %, p99 {p99} ms)"
    knee = step.format_map(steady[-1]) if steady else "below the first step"
    beyond = "at {label} requests/s success is {success} % and p99 {p99} ms".format_map(rows[-1])
    print(f"No knee up to {knee}." if rows[-1]["steady"] else f"The knee: {knee}; {beyond}.")


def print_flat_out(rows):
    print_load("flat out", rows)
    best = max(rows, key=lambda row: row["got"])
    print(f"The maximum flat out: {best['got']} requests/s ({best['label']}).")


def print_phases(title, rows):
    for number, (before, row) in enumerate(zip([rows[0], *rows], rows), 1):
        row |= {"number": number, "factor": row["got"] / before["got"]}
    head = f"{title:<52} {'requests/s':>10} {'p99_ms':>9} {'factor':>7}"
    template = "{number} {label:<50} {got:>10} {p99:>9} {factor:>7.2f}"
    print_rows(head, template, rows, "got")
    first, last = rows[0]["got"], rows[-1]["got"]
    print(f"From {first} to {last} requests/s: times {last // first}.")


def print_journey(rows, *phases):
    phases = [phase.split("|") for phase in phases]
    record = [{"label": p[0], "got": int(p[3]), "p99": p[4], "flaws": ""} for p in phases]
    print_phases("phase, on record", record)
    print_phases("phase, measured here", rows)
    print("\nEach phase is one server and one run of load_test.py:")
    for number, (_, server, tester, _, _) in enumerate(phases, 1):
        print(f"{number}  metricstream.py {server}\n   load_test.py PORT {tester}")


path, what, *arguments = sys.argv[1:]
rows = [row_of(**json.loads(line)) for line in open(path)]
if what == "answered":
    sys.exit(rows[-1]["got"] == 0)
elif what == "steady":
    sys.exit(not rows[-1]["steady"])
elif what == "knee":
    print_knee(rows)
elif what == "flat out":
    print_flat_out(rows)
elif what == "batches":
    print_load("flat out, 50 clients", rows, "metrics")
elif what == "journey":
    print_journey(rows, *arguments)
sys.exit(any(row["failed"] for row in rows))
PYTHON
}

report() { tee -a -- "$scratch/report"; }

report_table() {
  table "$@" | report || flawed=yes
  rm -- "$scratch/runs"
}

report_heading() {
  local commit
  commit=$(git -C "$here" rev-parse --short HEAD 2>/dev/null) || commit=unknown
  [[ -z $(git -C "$here" status --porcelain -uno 2>/dev/null) ]] || commit+=' with changes'
  printf 'MetricStream: %s\n%s, %s, %s cores, commit %s\n%s s a step, %s\n' "$1" \
    "$(date '+%Y-%m-%d %H:%M %z')" "$("$python" --version)" "$(nproc)" "$commit" "$seconds" "$2" |
    report
}

# --- Part 1: the load curve ----------------------------------------------------------------------

load_curve() {
  local rate clients batch
  if [[ $port ]]; then
    report_heading 'load curve' "the server that runs on port $port"
  else
    start_server --rate-limit 0
    report_heading 'load curve' 'a server with --rate-limit 0'
  fi

  for rate in "${RATES[@]}"; do
    measure "$rate" 50 --rate "$rate"
    table steady || break
  done
  report_table knee

  for clients in 20 50 100 500; do
    measure "$clients clients, keep-alive" "$clients"
    measure "$clients clients, --close" "$clients" --close
  done
  report_table 'flat out'

  for batch in 1 10 100 1000; do
    measure "$batch metrics a request" 50 --batch "$batch"
  done
  report_table batches
}

# --- Part 2: the journey -------------------------------------------------------------------------

journey() {
  local disk phase label options arguments
  [[ -z $port ]] || fail 'the journey starts servers of its own: run it without PORT'
  disk=$(df --output=source,fstype -- "$scratch" | tail -n 1 | tr -s ' ')
  report_heading 'the journey' "log on $disk"
  sed -n '/^# --- The journey ---$/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | tail -n +2 | report
  for phase in "${PHASES[@]}"; do
    IFS='|' read -r label options arguments _ <<<"$phase"
    IFS=' ' read -ra options <<<"$options"
    IFS=' ' read -ra arguments <<<"$arguments"
    start_server "${options[@]}"
    measure "$label" "${arguments[@]}"
    end_server
    table answered || fail "no request succeeded in the phase: $label"
  done
  report_table journey "${PHASES[@]}"
}

# --- The run -------------------------------------------------------------------------------------

case "$*" in
  '') load_curve ;;
  journey) journey ;;
  *) fail 'the only argument is: journey (see the head of this file)' ;;
esac
cp -- "$scratch/report" "$here/performance_results.txt"
[[ $flawed == no ]] || fail 'requests failed: see the last column'
