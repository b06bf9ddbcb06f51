# CPU:          docker build -t kepo_jax .
# NVIDIA GPUs:  docker build -t kepo_jax --build-arg ACCELERATOR=gpu .     then docker run --gpus all ...
# TPU host:     docker build -t kepo_jax --build-arg ACCELERATOR=tpu .     then docker run --privileged --net=host ...
#
# docker run -v "$PWD/runs:/kepo_jax/runs" kepo_jax                        trains the demo and keeps its run
# docker run -v DIR:DIR ... kepo_jax python -m experiments.kepo_medvqa --config=... --workdir=DIR/run --auto_resume
FROM python:3.12-slim
ARG ACCELERATOR=cpu
WORKDIR /kepo_jax
# Before the sources: an edit of them installs nothing again.
COPY requirements.txt setup.cfg pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir -e ".[$ACCELERATOR]"
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "experiments.kepo_medvqa"]
