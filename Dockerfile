# Server of a converted model on a CPU; docs/how-to/deploy.md describes how to build and run it.
FROM python:3.13-slim-bookworm

# Address of another index, such as PyTorch's with builds for CPUs, which are much smaller than those for CUDA.
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 10001 tnnlm
WORKDIR /opt/tnnlm
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY configs configs
COPY tnnlm tnnlm
RUN pip install -c constraints.txt '.[serve,constrained]'

# Neither the package nor the model can be changed by the server.
USER tnnlm
WORKDIR /home/tnnlm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The address is that of the container: publish the port with -p 127.0.0.1:8000:8000, or set TNNLM_API_KEY.
ENTRYPOINT ["tnnlm", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "/model"]
