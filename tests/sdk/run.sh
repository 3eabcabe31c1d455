#!/usr/bin/env bash
# Drives the gateway with the official OpenAI SDKs for Python and Node, in front of a scripted upstream.
#
#     tests/sdk/run.sh target/release/gpt-cat     the gateway
#     tests/sdk/run.sh --direct                   the drivers and the upstream alone: are they right?
#
# Needs python3 with venv, node, npm, and their package registries. All that it makes is in a scratch folder, which it
# removes. Its last line is "sdk: N passed, N failed, N skipped"; it fails when anything did.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ $# -eq 1 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

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
    cp "$here/package.json" "$here/client.mjs" "$scratch/"
    (cd "$scratch" && npm install --silent --no-audit --no-fund --no-package-lock)
}

start_upstream() {
    python3 "$here/upstream.py" </dev/null >"$scratch/upstream.out" 2>"$scratch/upstream.err" &
    servers+=($!)
    UPSTREAM=$(address_in "$scratch/upstream.out" $! "$scratch/upstream.err")
    export UPSTREAM
}

# `openai` is the built-in endpoint at another address, so that none is left which points out of this machine. Those
# whose accounts the upstream sends to rest are apart from it.
write_config() {
    cat >"$GATEWAY_CONFIG" <<TOML
database_url = "sqlite:$scratch/data/gpt-cat.db"
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
    printf '[endpoints.%s]\ndialect = "openai"\nbase_url = "%s/v1"\nmodels = [%s]\n' "$name" "$UPSTREAM" "${list%, }"
    printf '[models."%s"]\ninput = "1000"\noutput = "2000"\n' "$@"
} >>"$GATEWAY_CONFIG"

start_gateway() {
    GATEWAY=$(realpath "$1")
    export GATEWAY GATEWAY_CONFIG=$scratch/gpt-cat.toml
    mkdir "$scratch/data"
    write_config
    (cd "$scratch" && GPT_CAT_FIRST_KEY=$first_key exec "$GATEWAY" serve --config "$GATEWAY_CONFIG") \
        >"$scratch/gateway.out" 2>"$scratch/gateway.err" </dev/null &
    gateway=$!
    servers+=("$gateway")
    BASE_URL=$(address_in "$scratch/gateway.out" "$gateway" "$scratch/gateway.err")/v1
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
    if "$GATEWAY" audit --config "$GATEWAY_CONFIG" >"$scratch/audit.out" 2>&1; then
        say ok "the books add up $1"
    else
        say FAILED "the books add up $1"
        cat "$scratch/audit.out"
    fi
}

stop_gateway() {
    kill -TERM "$gateway"
    if wait "$gateway"; then say ok "the gateway ends when it is told to"; else say FAILED "the gateway ends when it is told to"; fi
    if grep -qF -e "$first_key" -e "$UPSTREAM_KEY" "$scratch/gateway.err"; then
        say FAILED "no key is in the log"
    else
        say ok "no key is in the log"
    fi
}

count() { grep -c "^$1 " "$report" || true; }

install_sdks
start_upstream
if [[ $1 == --direct ]]; then
    export BASE_URL=$UPSTREAM/v1 API_KEY=$UPSTREAM_KEY
else
    start_gateway "$1"
fi
drive python "$scratch/venv/bin/python" "$here/client.py"
drive node node "$scratch/client.mjs"
if [[ $1 != --direct ]]; then
    check_books "beside the running server"
    stop_gateway
    check_books "after it has ended"
fi
if [[ $(count FAILED) -gt 0 ]]; then
    for log in "$scratch"/*.err; do echo "-- the end of $(basename "$log")"; tail -40 "$log"; done
fi
echo "sdk: $(count ok) passed, $(count FAILED) failed, $(count skipped) skipped"
[[ $(count FAILED) -eq 0 ]]
