-- Roles for a mentor-serve database on PostgreSQL 15 or newer.
--
-- Run it in that database, as the role that owns the tables (the one that runs
-- `mentor-serve db upgrade`) and may create roles. Running it again changes nothing. Passwords are
-- not set here: give them with \password in psql, or leave them to the server's own means.
--
--   :writer   the service: reads and writes rows, makes and drops nothing
--   :reader   the dashboard and analysts: reads everything, writes nothing

BEGIN;

DO $roles$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY[':writer', ':reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', wanted);
        END IF;
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), wanted);
    END LOOP;
END
$roles$;

-- Tables come from migrations alone; PostgreSQL before 15 let everybody make some.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO :writer, :reader;

-- What is there (views are tables here) ...
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO :writer;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO :reader;

-- ... and what this role's later migrations make.
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO :writer;
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT ON TABLES TO :reader;

-- A query that somebody forgot holds neither a place in the pool nor the autovacuum up.
ALTER ROLE :reader CONNECTION LIMIT 20;
ALTER ROLE :reader SET default_transaction_read_only = on;
ALTER ROLE :reader SET statement_timeout = '60s';
ALTER ROLE :reader SET idle_in_transaction_session_timeout = '60s';
ALTER ROLE :writer SET idle_in_transaction_session_timeout = '10min';

COMMIT;
