FROM python:3.11-slim

RUN useradd --create-home mentor \
    && mkdir -p /var/lib/mentor /app \
    && chown mentor:mentor /var/lib/mentor /app
WORKDIR /app

COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mentor_serve mentor_serve
COPY apps apps
COPY migrations migrations
COPY dashboards dashboards
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[dashboard,postgres]'

USER mentor
VOLUME /var/lib/mentor
EXPOSE 8000 8501
CMD ["mentor-serve", "up", "--no-dashboard", "--host", "0.0.0.0"]
