"""Real clients of other embedding APIs against a real server: vectors as those of /v1/embeddings.

The clients are the newest packages, unchanged.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import huggingface_hub
import numpy as np
import ollama
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors
from google.genai import types as genai_types
from huggingface_hub.errors import HfHubHTTPError
from numpy.typing import ArrayLike

from conftest import running_server
from keyfiles import entry

BF16_DIFFERENCE = 1e-3
"""Documented maximum difference per component between batches."""

MODEL = "taskvec-mini"
TEXTS = ["how do plants make food", "the bank raised its rates"]


def expected(server_url: str, **fields: Any) -> list[list[float]]:
    """The vectors of /v1/embeddings."""
    answer = httpx.post(f"{server_url}/v1/embeddings", json={"input": TEXTS} | fields)
    return [entry["embedding"] for entry in answer.json()["data"]]


def assert_same(vectors: ArrayLike, truth: ArrayLike) -> None:
    """Vectors of two requests with the same texts are the same within bfloat16."""
    np.testing.assert_allclose(np.asarray(vectors), np.asarray(truth), atol=BF16_DIFFERENCE)


@pytest.fixture(scope="module")
def keyed_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an API key, ``s3cret``."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    with running_server("--keys-file", str(file)) as url:
        yield url


def test_cohere_gets_every_type(server_url: str) -> None:
    """Cohere's ClientV2 gets six types in one answer, each as /v1/embeddings gives it."""
    with cohere.ClientV2("none", base_url=server_url) as client:
        answer = client.embed(
            model=MODEL,
            texts=TEXTS,
            input_type="search_document",
            embedding_types=["float", "int8", "uint8", "binary", "ubinary", "base64"],
            output_dimension=64,
        )
    truth = expected(server_url, task="retrieval.passage", dimensions=64)
    found = answer.embeddings
    assert_same(found.float_ or [], truth)
    packed = [np.frombuffer(base64.b64decode(row), "<f4") for row in found.base64 or []]
    assert_same(packed, truth)
    assert np.shape(found.int8) == np.shape(found.uint8) == (2, 64)
    assert np.subtract(found.uint8 or [], found.int8 or []).tolist() == [[128] * 64] * 2
    assert np.subtract(found.ubinary or [], found.binary or []).tolist() == [[128] * 8] * 2
    assert (np.unpackbits(np.uint8(found.ubinary), axis=1) == (np.array(truth) > 0)).mean() > 0.98
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    assert (answer.meta.billed_units.input_tokens or 0) > 4


def test_cohere_sends_content(server_url: str) -> None:
    """Cohere's ClientV2 with ``inputs`` gets the vectors of the same texts."""
    inputs: Any = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    with cohere.ClientV2("none", base_url=server_url) as client:
        answer = client.embed(model=MODEL, inputs=inputs, input_type="clustering")
    assert_same(answer.embeddings.float_ or [], expected(server_url, task="clustering"))


@pytest.mark.anyio
async def test_cohere_asynchronously(server_url: str) -> None:
    """Cohere's AsyncClientV2 gets the same vectors."""
    async with cohere.AsyncClientV2("none", base_url=server_url) as client:
        answer = await client.embed(
            model=MODEL, texts=TEXTS, input_type="search_query", embedding_types=["float"]
        )
    assert_same(answer.embeddings.float_ or [], expected(server_url, task="retrieval.query"))


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # cohere's own
def test_coheres_first_version(server_url: str) -> None:
    """Cohere's Client gets both shapes of the first version, and merges its own batches of 96."""
    texts = [f"{TEXTS[i % 2]}" for i in range(200)]
    with cohere.Client("none", base_url=server_url) as client:
        plain: Any = client.embed(texts=texts)
        typed: Any = client.embed(
            texts=TEXTS, input_type="classification", embedding_types=["float", "ubinary"]
        )
    assert_same(plain.embeddings, expected(server_url) * 100)
    assert plain.meta.billed_units.input_tokens > 200
    assert_same(typed.embeddings.float_, expected(server_url, task="classification"))
    assert np.shape(typed.embeddings.ubinary) == (2, 32)


def test_cohere_reads_our_errors(server_url: str, keyed_url: str) -> None:
    """Cohere raises the exception of each status, with our message in its body."""
    options: Any = {"max_retries": 0}
    with cohere.ClientV2("none", base_url=server_url) as client:
        with pytest.raises(cohere.BadRequestError) as bad:
            client.embed(model=MODEL, texts=["a", ""], input_type="clustering")
        assert "texts[1]" in bad.value.body["message"]
        with pytest.raises(cohere.NotFoundError, match="taskvec-mini"):
            client.embed(model="embed-v4.0", texts=["a"], input_type="clustering")
        with pytest.raises(cohere.BadRequestError, match="images is not served"):
            client.embed(model=MODEL, images=["data:image/png;base64,AA=="], input_type="image")
    with (
        cohere.ClientV2("wrong", base_url=keyed_url) as client,
        pytest.raises(cohere.UnauthorizedError, match="Unknown API key"),
    ):
        client.embed(model=MODEL, texts=["a"], input_type="clustering", request_options=options)
    with cohere.ClientV2("s3cret", base_url=keyed_url) as client:
        client.embed(model=MODEL, texts=["a"], input_type="clustering")


QUERY = "what do leaves do"


def ranked(server_url: str) -> list[tuple[int, float]]:
    """Index and cosine of each of TEXTS with QUERY by /v1/embeddings, best first."""
    (query, *_) = expected(server_url, input=[QUERY], task="retrieval.query")
    passages = np.array(expected(server_url, task="retrieval.passage"))
    return sorted(enumerate((passages @ np.array(query)).tolist()), key=lambda pair: -pair[1])


def assert_ranked(results: list[Any], server_url: str) -> None:
    """The results have the order and the cosines of the vectors."""
    truth = ranked(server_url)
    assert [result.index for result in results] == [index for index, _ in truth]
    scores = [result.relevance_score for result in results]
    assert_same(scores, [score for _, score in truth])


def test_cohere_ranks(server_url: str) -> None:
    """Cohere's ClientV2 ranks documents by cosine, and reads what its answer has."""
    with cohere.ClientV2("none", base_url=server_url) as client:
        answer = client.rerank(model=MODEL, query=QUERY, documents=TEXTS)
        best = client.rerank(
            model=MODEL, query=QUERY, documents=TEXTS, top_n=1, max_tokens_per_doc=4096, priority=1
        )
    assert_ranked(answer.results, server_url)
    assert [result.index for result in best.results] == [ranked(server_url)[0][0]]
    assert answer.id
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    assert answer.meta.billed_units.search_units == 1
    assert "not the score of a cross-encoder" in (answer.meta.warnings or [""])[0]


@pytest.mark.anyio
async def test_cohere_ranks_asynchronously(server_url: str) -> None:
    """Cohere's AsyncClientV2 and AsyncClient rank as well."""
    async with cohere.AsyncClientV2("none", base_url=server_url) as client:
        answer = await client.rerank(model=MODEL, query=QUERY, documents=TEXTS)
    assert_ranked(answer.results, server_url)
    async with cohere.AsyncClient("none", base_url=server_url) as first:
        old = await first.rerank(query=QUERY, documents=TEXTS)
    assert_ranked(old.results, server_url)


def test_coheres_first_version_ranks(server_url: str) -> None:
    """Cohere's Client sends texts and objects, and gets the documents if it asks for them."""
    documents: Any = [TEXTS[0], {"text": TEXTS[1], "title": "money"}]
    with cohere.Client("none", base_url=server_url) as client:
        answer = client.rerank(
            model=MODEL,
            query=QUERY,
            documents=documents,
            rank_fields=["text"],
            return_documents=True,
        )
        plain = client.rerank(query=QUERY, documents=TEXTS, return_documents=False, top_n=2)
    assert_ranked(answer.results, server_url)
    assert [result.document and result.document.text for result in answer.results] == [
        TEXTS[result.index] for result in answer.results
    ]
    assert [result.document for result in plain.results] == [None, None]


def test_cohere_reads_our_errors_when_it_ranks(server_url: str, keyed_url: str) -> None:
    """Cohere raises the exception of each status, with our message, for both versions."""
    options: Any = {"max_retries": 0}
    for kind in (cohere.ClientV2, cohere.Client):
        with kind("none", base_url=server_url) as client:
            with pytest.raises(cohere.BadRequestError) as bad:
                client.rerank(model=MODEL, query="q", documents=["a", ""])
            assert "documents[1]" in bad.value.body["message"]
            with pytest.raises(cohere.BadRequestError, match="top_n must be at least 1"):
                client.rerank(model=MODEL, query="q", documents=["a"], top_n=0)
            with pytest.raises(cohere.NotFoundError, match="taskvec-mini"):
                client.rerank(model="rerank-v3.5", query="q", documents=["a"])
        with (
            kind("wrong", base_url=keyed_url) as client,
            pytest.raises(cohere.UnauthorizedError, match="Unknown API key"),
        ):
            client.rerank(model=MODEL, query="q", documents=["a"], request_options=options)
        with kind("s3cret", base_url=keyed_url) as client:
            assert len(client.rerank(model=MODEL, query="q", documents=["a"]).results) == 1


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/rerank", {"top_n": 2, "return_documents": True}),  # jina_ai/
        ("/v2/rerank", {"return_documents": True, "max_tokens_per_doc": 4096}),  # cohere/
    ],
)
def test_what_litellm_sends(server_url: str, path: str, more: dict[str, Any]) -> None:
    """Requests recorded from LiteLLM 1.110 are answered; `make test-clients` runs LiteLLM."""
    body = {"model": MODEL, "query": QUERY, "documents": TEXTS, **more}
    headers = {"authorization": "Bearer none", "accept": "application/json"}
    answer = httpx.post(f"{server_url}{path}", json=body, headers=headers).json()
    assert [entry["index"] for entry in answer["results"]] == [i for i, _ in ranked(server_url)]
    assert [entry["document"]["text"] for entry in answer["results"]] == [
        TEXTS[entry["index"]] for entry in answer["results"]
    ]
    if path == "/v1/rerank":
        assert answer["usage"]["total_tokens"] > 5


def test_ollama_gets_vectors(server_url: str) -> None:
    """The ollama package gets the vectors of a task, by either route."""
    with ollama.Client(server_url) as client:
        answer = client.embed(f"{MODEL}:clustering", TEXTS, dimensions=64, truncate=False)
        one = client.embed(MODEL, TEXTS[0], options={"temperature": 0.0}, keep_alive="5m")
        old = client.embeddings(f"{MODEL}:latest", TEXTS[0])
    assert_same(answer.embeddings, expected(server_url, task="clustering", dimensions=64))
    assert (answer.prompt_eval_count or 0) > 4
    assert_same(one.embeddings, expected(server_url)[:1])
    assert_same(old.embedding, expected(server_url)[0])


@pytest.mark.anyio
async def test_ollama_asynchronously(server_url: str) -> None:
    """The asynchronous client gets the same vectors."""
    async with ollama.AsyncClient(server_url) as client:
        answer = await client.embed(f"{MODEL}:retrieval.query", TEXTS)
    assert_same(answer.embeddings, expected(server_url, task="retrieval.query"))


def test_ollama_lists_and_shows_models(server_url: str) -> None:
    """The ollama package lists the model, and shows what it can do."""
    with ollama.Client(server_url) as client:
        names = [model.model for model in client.list().models]
        shown = client.show(MODEL)
    assert names[0] == f"{MODEL}:latest"
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "qwen3"


def test_ollama_reads_our_errors(server_url: str, keyed_url: str) -> None:
    """The ollama package raises our status with our message, and sends a key."""
    with ollama.Client(server_url) as client:
        with pytest.raises(ollama.ResponseError, match=r"input\[1\]") as bad:
            client.embed(MODEL, ["a", ""])
        assert bad.value.status_code == 400
        with pytest.raises(ollama.ResponseError, match="There is no model 'llama3'") as missing:
            client.embed("llama3", "a")
        assert missing.value.status_code == 404
    with (
        ollama.Client(keyed_url, headers={"Authorization": "Bearer wrong"}) as client,
        pytest.raises(ollama.ResponseError, match="Unknown API key"),
    ):
        client.embed(MODEL, "a")
    with ollama.Client(keyed_url, headers={"Authorization": "Bearer s3cret"}) as client:
        assert len(client.embed(MODEL, "a").embeddings) == 1


@pytest.mark.parametrize("path", ["", "/embed"])
def test_hugging_face_gets_vectors(server_url: str, path: str) -> None:
    """InferenceClient posts to the URL as it is, and gets float32 arrays."""
    client = huggingface_hub.InferenceClient(f"{server_url}{path}")
    assert_same(client.feature_extraction(TEXTS[0]), expected(server_url)[:1])
    several: Any = TEXTS
    vectors = client.feature_extraction(
        several,
        normalize=True,
        prompt_name="query",
        truncate=True,
        truncation_direction="right",
        dimensions=64,
        encoding_format="float",
    )
    assert vectors.dtype == np.float32
    assert_same(vectors, expected(server_url, task="retrieval.query", dimensions=64))


@pytest.mark.anyio
async def test_hugging_face_asynchronously(server_url: str) -> None:
    """AsyncInferenceClient gets the same vectors."""
    async with huggingface_hub.AsyncInferenceClient(server_url) as client:
        vectors = await client.feature_extraction(TEXTS[1], prompt_name="clustering")
    assert_same(vectors, expected(server_url, task="clustering")[1:])


def test_hugging_face_compares(server_url: str) -> None:
    """InferenceClient.sentence_similarity gets cosines from /similarity."""
    client = huggingface_hub.InferenceClient(f"{server_url}/similarity")
    cosines = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS)
    vectors = np.array(expected(server_url))
    assert_same(cosines, [1.0, vectors[0] @ vectors[1]])


def test_hugging_face_reads_our_errors(server_url: str, keyed_url: str) -> None:
    """InferenceClient raises our status with our message, and sends a key."""
    client = huggingface_hub.InferenceClient(server_url)
    with pytest.raises(HfHubHTTPError, match="no task 'poem'") as bad:
        client.feature_extraction("a", prompt_name="poem")
    assert bad.value.response.status_code == 400
    wrong = huggingface_hub.InferenceClient(keyed_url, token="wrong")  # noqa: S106 - a test's
    with pytest.raises(HfHubHTTPError, match="Unknown API key"):
        wrong.feature_extraction("a")
    right = huggingface_hub.InferenceClient(keyed_url, token="s3cret")  # noqa: S106 - a test's
    assert right.feature_extraction("a").shape == (1, 256)


def test_azure_openai_gets_vectors(server_url: str, keyed_url: str) -> None:
    """AzureOpenAI gets the vectors of a deployment by endpoint and by base URL, with its key."""
    deployment = f"{MODEL}:clustering"
    options: Any = {"api_version": "2024-10-21", "max_retries": 0}
    truth = expected(server_url, task="clustering")
    for where in ({"azure_endpoint": server_url}, {"base_url": f"{server_url}/v1"}):
        with openai.AzureOpenAI(api_key="none", **where, **options) as client:
            answer = client.embeddings.create(model=deployment, input=TEXTS)
            assert_same([entry.embedding for entry in answer.data], truth)
            with pytest.raises(openai.NotFoundError, match="There is no model"):
                client.embeddings.create(model="gpt", input="a")
    with (
        openai.AzureOpenAI(api_key="wrong", azure_endpoint=keyed_url, **options) as client,
        pytest.raises(openai.AuthenticationError, match="Unknown API key"),
    ):
        client.embeddings.create(model=MODEL, input="a")
    with openai.AzureOpenAI(api_key="s3cret", azure_endpoint=keyed_url, **options) as client:
        assert len(client.embeddings.create(model=MODEL, input="a").data) == 1


def test_openai_without_version(server_url: str) -> None:
    """A client whose base URL lacks /v1 gets the same vectors."""
    with openai.OpenAI(base_url=server_url, api_key="none") as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert_same([entry.embedding for entry in answer.data], expected(server_url))


def google_client(url: str, key: str = "none", version: str | None = None) -> genai.Client:
    """A client of google-genai for our server."""
    options = genai_types.HttpOptions(base_url=url, api_version=version)
    return genai.Client(api_key=key, http_options=options)


@pytest.mark.parametrize("version", [None, "v1beta"])
def test_google_gets_vectors(server_url: str, version: str | None) -> None:
    """google-genai gets the vectors of a task type, by its own version of the API and v1beta."""
    config = genai_types.EmbedContentConfig(task_type="RETRIEVAL_QUERY", output_dimensionality=64)
    contents: Any = TEXTS
    with google_client(server_url, version=version) as client:
        answer = client.models.embed_content(model=MODEL, contents=contents, config=config)
        one = client.models.embed_content(model=f"models/{MODEL}", contents=TEXTS[0])
    found = [entry.values or [] for entry in answer.embeddings or []]
    assert_same(found, expected(server_url, task="retrieval.query", dimensions=64))
    assert_same([entry.values or [] for entry in one.embeddings or []], expected(server_url)[:1])


@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
@pytest.mark.anyio
async def test_google_asynchronously(server_url: str) -> None:
    """The asynchronous client of google-genai gets the same vectors."""
    contents: Any = TEXTS
    async with google_client(server_url).aio as client:
        answer = await client.models.embed_content(
            model=MODEL,
            contents=contents,
            config=genai_types.EmbedContentConfig(task_type="CLUSTERING"),
        )
    found = [entry.values or [] for entry in answer.embeddings or []]
    assert_same(found, expected(server_url, task="clustering"))


def test_google_reads_our_errors(server_url: str, keyed_url: str) -> None:
    """google-genai raises our status with our message, and sends its key in its own header."""
    with google_client(server_url) as client:
        with pytest.raises(genai_errors.ClientError, match="INVALID_ARGUMENT") as bad:
            client.models.embed_content(
                model=MODEL,
                contents="a",
                config=genai_types.EmbedContentConfig(output_dimensionality=1000),
            )
        assert bad.value.code == 400
        assert "outputDimensionality must be between" in (bad.value.message or "")
        with pytest.raises(genai_errors.ClientError, match="NOT_FOUND"):
            client.models.embed_content(model="gemini-embedding-001", contents="a")
    with (
        google_client(keyed_url, "wrong") as client,
        pytest.raises(genai_errors.ClientError, match="UNAUTHENTICATED"),
    ):
        client.models.embed_content(model=MODEL, contents="a")
    with google_client(keyed_url, "s3cret") as client:
        client.models.embed_content(model=MODEL, contents="a")
