"""Embed two texts and check the response: the script of `helm test`, standard library only."""

import json
import math
import os
import ssl
import urllib.error
import urllib.request

url = os.environ["URL"]
key = os.environ.get("API_KEY", "")
# The certificate is for the name that clients use, not for the Service's name.
unchecked = ssl._create_unverified_context()  # noqa: S323, SLF001

request = urllib.request.Request(  # noqa: S310
    f"{url}/v1/embeddings",
    json.dumps({"input": ["a text", "another text"]}).encode(),
    {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
)
try:
    with urllib.request.urlopen(request, timeout=60, context=unchecked) as response:  # noqa: S310
        answer = json.load(response)
except urllib.error.HTTPError as error:
    code = json.load(error)["code"]
    if os.environ["ASKS_FOR_KEY"] == "true" and not key and code == "missing_api_key":
        print("refused without a key, as expected; set test.existingSecret to test a response")
        raise SystemExit from None
    raise SystemExit(f"{url} returned {error.code} {code}") from None

vectors = [entry["embedding"] for entry in answer["data"]]
lengths = [math.hypot(*vector) for vector in vectors]
if len(vectors) != 2 or vectors[0] == vectors[1]:
    raise SystemExit(f"expected two different vectors, got {len(vectors)} vectors, or equal ones")
if not all(abs(length - 1) < 0.01 for length in lengths):
    raise SystemExit(f"expected vectors of length 1, got {lengths}")
print(f"two vectors of {len(vectors[0])} dimensions from {answer['model']}")
