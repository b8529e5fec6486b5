# The server on CPU, with the demo model unless told otherwise:
#   docker build -t paddlemix .
#   docker run --rm -p 127.0.0.1:23333:23333 paddlemix
#   docker run --rm -p 127.0.0.1:23333:23333 -v $PWD/InternVL2-1B:/model:ro paddlemix --model_name_or_path /model
# On Nvidia cards: --build-arg PADDLE="paddlepaddle-gpu==3.3.1 -i https://www.paddlepaddle.org.cn/packages/stable/cu126/" and
# docker run --gpus all. A key: -e PADDLEMIX_API_KEY.
FROM python:3.11-slim
ARG PADDLE=paddlepaddle==3.3.1
RUN apt-get update && apt-get install -y --no-install-recommends g++ libgomp1 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir ${PADDLE}
COPY . /src
RUN grep -v '^paddlepaddle' /src/requirements.txt > /tmp/requirements.txt && pip install --no-cache-dir -r /tmp/requirements.txt \
    && pip install --no-cache-dir --no-deps /src && rm -rf /src && useradd --create-home paddlemix
USER paddlemix
WORKDIR /home/paddlemix
EXPOSE 23333
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:23333/health', timeout=5)"]
# TERM ends it once running answers are finished.
ENTRYPOINT ["paddlemix", "serve", "--host", "0.0.0.0"]
