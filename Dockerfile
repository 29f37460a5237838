FROM python:3.13-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY ocpp_2w_proxy.py .
# The state lives in a volume; the ini is mounted beside it, so that its relative paths lead there.
RUN useradd --system --uid 10001 proxy && mkdir /data && chown proxy /data
USER proxy
WORKDIR /data
VOLUME /data
EXPOSE 8321
ENTRYPOINT ["python", "/app/ocpp_2w_proxy.py"]
