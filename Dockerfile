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
EXPOSE 8321 8322
# The port is that of [status] in the ini, where it is not 8322.
HEALTHCHECK --start-period=10s CMD ["python", "-c", "\
import http.client as h; c = h.HTTPConnection('127.0.0.1', 8322, timeout=5); \
c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "/app/ocpp_2w_proxy.py"]
