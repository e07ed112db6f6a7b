# Three images; docs/containers.md describes when to use each and how to run it.
#
#   docker build --target gateway .    gateway in front of engine servers, without torch
#   docker build --target cpu .        the packed engine with the built-in model
#   docker build --target vllm .       vLLM in the process, for NVIDIA GPUs
#
# All versions come from requirements/dev.txt, which is locked and tested.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# --- The wheel, and virtual environments with it ---

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /build
COPY requirements/dev.txt requirements/
RUN python -m pip install --no-cache-dir --constraint requirements/dev.txt hatchling
COPY CHANGELOG.md LICENSE README.md pyproject.toml ./
COPY service service
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM wheel AS gateway-environment
RUN python -m venv /opt/taskvec \
    && /opt/taskvec/bin/pip install --no-cache-dir --constraint requirements/dev.txt \
        "$(echo /wheels/taskvec-*.whl)[otel]"

FROM gateway-environment AS cpu-environment
# If the default index has CUDA builds of torch, set this to an index with CPU builds: saves 3 GB.
ARG PIP_EXTRA_INDEX_URL=
RUN /opt/taskvec/bin/pip install --no-cache-dir --constraint requirements/dev.txt \
        "$(echo /wheels/taskvec-*.whl)[otel,packed]"

# --- Runtime: no compiler, one writable folder ---

FROM ${PYTHON_IMAGE} AS runtime
RUN echo 'taskvec:x:65532:65532::/cache:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'taskvec:x:65532:' >> /etc/group \
    && install -d -o 65532 -g 65532 /cache
ENV PATH=/opt/taskvec/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TASKVEC_HOST=0.0.0.0
WORKDIR /cache
VOLUME ["/cache"]
EXPOSE 8080
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m \
    CMD ["python3", "-m", "taskvec.healthcheck"]
ENTRYPOINT ["taskvec"]
CMD ["serve"]

FROM runtime AS gateway
COPY --from=gateway-environment /opt/taskvec /opt/taskvec
ENV TASKVEC_ENGINE=remote
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="taskvec gateway" \
    org.opencontainers.image.description="OpenAI-compatible embeddings with a task per request, in front of engine servers" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

FROM runtime AS cpu
COPY --from=cpu-environment /opt/taskvec /opt/taskvec
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="taskvec" \
    org.opencontainers.image.description="OpenAI-compatible embeddings with a task per request, on a CPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# --- On vLLM's own image; its Python and packages are not changed ---

FROM ${VLLM_IMAGE} AS vllm
USER 0
COPY requirements/dev.txt deploy/docker/missing.py /build/
COPY --from=wheel /wheels /wheels
RUN python3 /build/missing.py /build/dev.txt > /build/missing.txt \
    && uv pip install --system --no-cache --constraint /build/missing.txt /wheels/taskvec-*.whl \
    && python3 -m taskvec version \
    && rm -r /build /wheels
RUN echo 'taskvec:x:65532:65532::/cache:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'taskvec:x:65532:' >> /etc/group \
    && install -d -o 65532 -g 65532 /cache
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TASKVEC_HOST=0.0.0.0 \
    TASKVEC_ENGINE=vllm
WORKDIR /cache
VOLUME ["/cache"]
EXPOSE 8080
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=15m \
    CMD ["python3", "-m", "taskvec.healthcheck"]
ENTRYPOINT ["taskvec"]
CMD ["serve"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="taskvec vllm" \
    org.opencontainers.image.description="OpenAI-compatible embeddings with a task per request, with vLLM on NVIDIA GPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
