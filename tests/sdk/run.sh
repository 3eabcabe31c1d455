#!/usr/bin/env bash
# Drives the gateway with the official OpenAI SDKs for Python and Node, LangChain and the Vercel AI SDK, in front of a
# scripted upstream: once that speaks OpenAI's API, and once that speaks DashScope's, through the adapter for Qwen.
#
#     tests/sdk/run.sh target/release/gpt-cat     the gateway
#     tests/sdk/run.sh --direct                   the drivers and the upstream alone: are they right?
#
# Needs python3 with venv, node, npm, and their package registries. All that it makes is in a scratch folder, which it
# removes. Its last line is "sdk: N passed, N failed, N skipped"; it fails when anything did.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $# -eq 1 ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

scratch=$(mktemp -d)
servers=()
clean_up() {
    for server in "${servers[@]}"; do kill "$server" 2>/dev/null || true; done
    # The gateway may still write what it drains.
    for server in "${servers[@]}"; do wait "$server" 2>/dev/null || true; done
    rm -rf "$scratch"
}
trap clean_up EXIT

# The client's proxy settings are for the way out; everything here is on this machine.
export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1

# Whoever runs this may have set up a gateway of their own: its keys and settings stay out.
unset OPENAI_API_KEY DASHSCOPE_API_KEY DATABASE_URL NUMBER_CAN_RETRIES REQUEST_CONCURRENCY_COUNT "${!GPT_CAT_@}"
unset HTTP_ADDRESS HTTP_PORT HTTPS_ADDRESS HTTPS_PORT TLS_CERT_PATH TLS_KEY_PATH

export UPSTREAM_KEY=sk-upstream-0123456789abcdef
first_key=sk-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL
report=$scratch/report
: >"$report"

# say ok|FAILED SENTENCE — one more line of the report.
say() { echo "$1 run: $2" | tee -a "$report"; }

# address_in FILE SERVER LOG — waits for "listening on http://…" in a server's output.
address_in() {
    for _ in $(seq 200); do
        local address
        address=$(sed -n 's/^listening on \(http:\/\/[^ /]*\).*/\1/p' "$1" | head -1)
        [[ -n $address ]] && { echo "$address"; return; }
        kill -0 "$2" 2>/dev/null || break
        sleep 0.1
    done
    echo "no server listens; it said:" >&2
    cat "$1" "$3" >&2
    return 1
}

install_sdks() {
    python3 -m venv "$scratch/venv"
    "$scratch/venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    # Node looks for packages beside the driver's own file.
    cp "$here/package.json" "$here/client.mjs" "$here/vercel.mjs" "$scratch/"
    (cd "$scratch" && npm install --silent --no-audit --no-fund --no-package-lock)
}

start_upstream() {
    PYTHONDONTWRITEBYTECODE=1 python3 "$here/upstream.py" </dev/null >"$work/upstream.out" 2>"$work/upstream.err" &
    servers+=($!)
    UPSTREAM=$(address_in "$work/upstream.out" $! "$work/upstream.err")
    export UPSTREAM
}

# `openai` is the built-in endpoint at another address, so that none is left which points out of this machine. Those
# whose accounts the upstream sends to rest are apart from it.
write_config() {
    cat >"$GATEWAY_CONFIG" <<TOML
database_url = "sqlite:$work/data/gpt-cat.db"
[server]
http = "127.0.0.1:0"
[admin]
listen = "off"
[ledger]
first_balance = "1000.00"
[endpoints.demo]
dialect = "demo"
models = ["demo"]
TOML
    endpoint openai gpt-4o gpt-4o-picky gpt-4o-slow-python gpt-4o-slow-node gpt-4o-priced-python gpt-4o-priced-node
    endpoint busy gpt-4o-busy
    endpoint busy_once_python gpt-4o-busy-once-python
    endpoint busy_once_node gpt-4o-busy-once-node
}

# endpoint NAME MODEL… — an endpoint and its models: 0.001 a token in, 0.002 a token out.
endpoint() {
    local name=$1 list
    shift
    list=$(printf '"%s", ' "$@")
    printf '[endpoints.%s]\ndialect = "%s"\nbase_url = "%s%s"\nmodels = [%s]\n' \
        "$name" "$DIALECT" "$UPSTREAM" "$base_path" "${list%, }"
    printf '[models."%s"]\ninput = "1000"\noutput = "2000"\n' "$@"
} >>"$GATEWAY_CONFIG"

start_gateway() {
    GATEWAY=$(realpath "$1")
    export GATEWAY GATEWAY_CONFIG=$work/gpt-cat.toml
    mkdir "$work/data"
    write_config
    (cd "$work" && GPT_CAT_FIRST_KEY=$first_key exec "$GATEWAY" serve --config "$GATEWAY_CONFIG") \
        >"$work/gateway.out" 2>"$work/gateway.err" </dev/null &
    gateway=$!
    servers+=("$gateway")
    BASE_URL=$(address_in "$work/gateway.out" "$gateway" "$work/gateway.err")/v1
    export BASE_URL API_KEY=$first_key
    for name in openai busy busy_once_python busy_once_node; do
        "$GATEWAY" account add --config "$GATEWAY_CONFIG" --endpoint "$name" --name "$name" --key-env UPSTREAM_KEY \
            --limit 100 >/dev/null
    done
    # "Accounts added at run time take effect within a second", and a second for a slow machine.
    sleep 2
}

# drive NAME COMMAND… — a driver's lines go into the report; one that died before its end is a failure, too.
drive() {
    local name=$1
    shift
    if ! "$@" 2>&1 | tee -a "$report"; then
        grep -q "^FAILED $name:" "$report" || echo "FAILED $name: the driver died" | tee -a "$report"
    fi
}

check_books() {
    if "$GATEWAY" audit --config "$GATEWAY_CONFIG" >"$work/audit.out" 2>&1; then
        say ok "the books add up $1"
    else
        say FAILED "the books add up $1"
        cat "$work/audit.out"
    fi
}

stop_gateway() {
    kill -TERM "$gateway"
    if wait "$gateway"; then say ok "the gateway ends when it is told to"; else say FAILED "the gateway ends when it is told to"; fi
    if grep -qF -e "$first_key" -e "$UPSTREAM_KEY" "$work/gateway.err"; then
        say FAILED "no key is in the log"
    else
        say ok "no key is in the log"
    fi
}

count() { grep -c "^$1 " "$report" || true; }

# run GATEWAY DIALECT BASE_PATH — every driver, against endpoints of this dialect.
run() {
    export DIALECT=$2
    base_path=$3
    work=$scratch/$DIALECT
    mkdir "$work"
    start_upstream
    if [[ $1 == --direct ]]; then
        export BASE_URL=$UPSTREAM/v1 API_KEY=$UPSTREAM_KEY
    else
        start_gateway "$1"
    fi
    # With another dialect the drivers' lines carry its name.
    local suffix=
    if [[ $DIALECT != openai ]]; then suffix=", $DIALECT"; fi
    drive "python$suffix" "$scratch/venv/bin/python" "$here/client.py"
    drive "node$suffix" node "$scratch/client.mjs"
    drive "langchain$suffix" "$scratch/venv/bin/python" "$here/chain.py"
    drive "vercel$suffix" node "$scratch/vercel.mjs"
    if [[ $1 != --direct ]]; then
        check_books "beside the running server ($DIALECT)"
        stop_gateway
        check_books "after it has ended ($DIALECT)"
    fi
}

install_sdks
run "$1" openai /v1
if [[ $1 != --direct ]]; then run "$1" qianwen /api/v1; fi
if [[ $(count FAILED) -gt 0 ]]; then
    for log in "$scratch"/*/*.err; do echo "-- the end of $(basename "$log")"; tail -40 "$log"; done
fi
echo "sdk: $(count ok) passed, $(count FAILED) failed, $(count skipped) skipped"
[[ $(count FAILED) -eq 0 ]]
