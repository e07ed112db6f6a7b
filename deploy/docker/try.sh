#!/usr/bin/env bash
# Start the image taskvec:cpu, and taskvec:gateway with it as engine server, both with minimal
# privileges. Each must become healthy, embed a text, and stop in time.
set -euo pipefail

network=taskvec-try-$$
engine=$network-engine
gateway=$network-gateway

clean_up() {
	status=$?
	for container in "$engine" "$gateway"; do
		((status == 0)) || docker logs "$container" || true
		docker rm --force --volumes "$container" >/dev/null 2>&1 || true
	done
	docker network rm "$network" >/dev/null || true
}
trap clean_up EXIT

start() { # NAME TARGET OPTION...
	docker run --detach --name "$1" --network "$network" --publish 127.0.0.1::8080 --read-only \
		--tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges "${@:3}" "taskvec:$2"
	for ((second = 0; second < 120; second++)); do
		health=$(docker inspect --format '{{.State.Health.Status}}' "$1")
		[[ $health == healthy ]] && return
		sleep 1
	done
	echo "$1 is $health after two minutes" >&2
	return 1
}

embed() { # NAME
	curl --silent --show-error --fail "http://$(docker port "$1" 8080/tcp)/v1/embeddings" \
		--json '{"input": "a text", "dimensions": 8}'
	echo
}

finish() { # NAME
	docker stop -t 75 "$1"
	code=$(docker inspect --format '{{.State.ExitCode}}' "$1")
	[[ $code == 0 || $code == 143 ]] || { echo "$1 ended with $code" >&2; return 1; }
}

docker network create "$network"
start "$engine" cpu --env TASKVEC_TOKEN_INPUT=accept
start "$gateway" gateway --env "TASKVEC_ENGINE_URL=http://$engine:8080"
embed "$engine"
embed "$gateway"
finish "$gateway"
finish "$engine"
