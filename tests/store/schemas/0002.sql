BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE evaluations (
	id VARCHAR(64) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	policy_version INTEGER NOT NULL, 
	suite VARCHAR(200) NOT NULL, 
	metric VARCHAR(64) NOT NULL, 
	k INTEGER, 
	value DOUBLE, 
	num_problems INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_evaluations PRIMARY KEY (id), 
	CONSTRAINT fk_evaluations_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "evaluations" VALUES('e-1','run',0,'sums','avg_at_k',8,0.25,4,'2026-01-31T12:00:00.000001Z');
INSERT INTO "evaluations" VALUES('e-2','run',1,'sums','avg_at_k',8,0.25,4,'2026-01-31T12:00:00.000001Z');
CREATE TABLE events (
	id VARCHAR(64) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	kind VARCHAR(64) NOT NULL, 
	severity VARCHAR(32) NOT NULL, 
	message TEXT NOT NULL, 
	details_json TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (id), 
	CONSTRAINT ck_events_severity CHECK (severity IN ('info', 'warning', 'error')), 
	CONSTRAINT fk_events_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('v-1','run','expert_down','warning','no answer','{}','2026-01-31T12:00:00.000001Z');
CREATE TABLE interventions (
	trajectory_id VARCHAR(64) NOT NULL, 
	position INTEGER NOT NULL, 
	proposed_token_id INTEGER NOT NULL, 
	proposed_text TEXT, 
	chosen_token_id INTEGER NOT NULL, 
	chosen_text TEXT, 
	entropy DOUBLE, 
	weight DOUBLE, 
	policy_logprob DOUBLE, 
	expert_logprob DOUBLE, 
	CONSTRAINT pk_interventions PRIMARY KEY (trajectory_id, position), 
	CONSTRAINT fk_interventions_trajectory_id_trajectories FOREIGN KEY(trajectory_id) REFERENCES trajectories (id) ON DELETE CASCADE
);
INSERT INTO "interventions" VALUES('t-2',1,7,' wait',9,NULL,2.5,0.75,-1.5,-0.25);
INSERT INTO "interventions" VALUES('t-2',3,7,' wait',9,NULL,2.5,0.75,-1.5,-0.25);
CREATE TABLE policy_versions (
	run_id VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	sha256 VARCHAR(64), 
	path TEXT, 
	created_at DATETIME NOT NULL, 
	is_live BOOLEAN NOT NULL, 
	parent_version INTEGER, 
	alpha DOUBLE NOT NULL, 
	gamma DOUBLE NOT NULL, 
	CONSTRAINT pk_policy_versions PRIMARY KEY (run_id, version), 
	CONSTRAINT fk_policy_versions_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "policy_versions" VALUES('run',0,0,'0000000000000000000000000000000000000000000000000000000000000000','weights/0','2026-01-31T12:00:00.000001Z',0,NULL,0.5,1.25);
INSERT INTO "policy_versions" VALUES('run',1,1,'0000000000000000000000000000000000000000000000000000000000000000','weights/1','2026-01-31T12:00:00.000001Z',1,0,0.5,1.25);
CREATE TABLE rollout_groups (
	id VARCHAR(64) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	task_id VARCHAR(64) NOT NULL, 
	policy_version INTEGER NOT NULL, 
	min_policy_version INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	gamma DOUBLE NOT NULL, 
	alpha DOUBLE NOT NULL, 
	status VARCHAR(32) NOT NULL, 
	num_on_policy INTEGER NOT NULL, 
	num_mixed INTEGER NOT NULL, 
	lease_owner VARCHAR(200), 
	lease_expires_at DATETIME, 
	consumed_by_step INTEGER, 
	error TEXT, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_rollout_groups PRIMARY KEY (id), 
	CONSTRAINT ck_rollout_groups_status CHECK (status IN ('ready', 'leased', 'consumed', 'stale', 'failed')), 
	CONSTRAINT fk_rollout_groups_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_rollout_groups_task_id_tasks FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE
);
INSERT INTO "rollout_groups" VALUES('g-1','run','task',0,0,0,1.25,0.5,'consumed',1,1,NULL,NULL,1,NULL,'2026-01-31T12:00:00.000001Z');
INSERT INTO "rollout_groups" VALUES('g-2','run','task',1,1,0,1.25,0.5,'ready',1,0,NULL,NULL,NULL,NULL,'2026-01-31T12:00:00.000001Z');
INSERT INTO "rollout_groups" VALUES('g-3','run','task',0,0,0,1.25,0.5,'failed',0,0,NULL,NULL,NULL,'no rollout','2026-01-31T12:00:00.000001Z');
CREATE TABLE runs (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	config_json TEXT NOT NULL, 
	started_at DATETIME NOT NULL, 
	updated_at DATETIME NOT NULL, 
	CONSTRAINT pk_runs PRIMARY KEY (id), 
	CONSTRAINT uq_runs_name UNIQUE (name)
);
INSERT INTO "runs" VALUES('run','test','{}','2026-01-31T12:00:00.000001Z','2026-01-31T12:00:00.000001Z');
CREATE TABLE tasks (
	id VARCHAR(64) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	source VARCHAR(200) NOT NULL, 
	prompt TEXT NOT NULL, 
	answer TEXT NOT NULL, 
	split VARCHAR(64) NOT NULL, 
	metadata_json TEXT NOT NULL, 
	content_key VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_tasks PRIMARY KEY (id), 
	CONSTRAINT fk_tasks_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_tasks_run_id_content_key UNIQUE (run_id, content_key)
);
INSERT INTO "tasks" VALUES('task','run','test:sums','1 + 1 = ?','2','train','{"n": 1}','kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk','2026-01-31T12:00:00.000001Z');
CREATE TABLE trajectories (
	id VARCHAR(64) NOT NULL, 
	group_id VARCHAR(64), 
	run_id VARCHAR(64) NOT NULL, 
	task_id VARCHAR(64), 
	kind VARCHAR(32) NOT NULL, 
	sample_index INTEGER NOT NULL, 
	status VARCHAR(32) NOT NULL, 
	error TEXT, 
	reward DOUBLE, 
	accuracy DOUBLE, 
	format_score DOUBLE, 
	text TEXT, 
	num_prompt_tokens INTEGER NOT NULL, 
	num_tokens INTEGER NOT NULL, 
	num_gated INTEGER NOT NULL, 
	num_interventions INTEGER NOT NULL, 
	mean_entropy DOUBLE, 
	mean_weight DOUBLE, 
	min_policy_version INTEGER NOT NULL, 
	max_policy_version INTEGER NOT NULL, 
	stop_reason VARCHAR(32), 
	latency_s DOUBLE, 
	seed BIGINT, 
	expert_lost BOOLEAN NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_trajectories PRIMARY KEY (id), 
	CONSTRAINT ck_trajectories_kind CHECK (kind IN ('on_policy', 'mixed', 'expert', 'served')), 
	CONSTRAINT ck_trajectories_status CHECK (status IN ('ok', 'failed')), 
	CONSTRAINT fk_trajectories_group_id_rollout_groups FOREIGN KEY(group_id) REFERENCES rollout_groups (id) ON DELETE CASCADE, 
	CONSTRAINT fk_trajectories_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_trajectories_task_id_tasks FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE, 
	CONSTRAINT uq_trajectories_group_id_kind_sample_index UNIQUE (group_id, kind, sample_index)
);
INSERT INTO "trajectories" VALUES('t-1','g-1','run','task','on_policy',0,'ok',NULL,1.0,1.0,1.0,'<think>1 + 1</think> 3 ☃',3,10,0,0,0.5,0.0,0,0,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
INSERT INTO "trajectories" VALUES('t-2','g-1','run','task','mixed',0,'ok',NULL,0.1,0.0,1.0,'<think>1 + 1</think> 3 ☃',3,20,4,2,0.25,0.5,0,0,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
INSERT INTO "trajectories" VALUES('t-3','g-2','run','task','on_policy',0,'ok',NULL,0.1,0.0,1.0,'<think>1 + 1</think> 3 ☃',3,3,0,0,NULL,0.0,1,1,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
INSERT INTO "trajectories" VALUES('t-4','g-2','run','task','mixed',0,'failed','no answer',NULL,NULL,1.0,'<think>1 + 1</think> 3 ☃',3,0,0,0,NULL,0.0,0,0,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
INSERT INTO "trajectories" VALUES('t-5',NULL,'run',NULL,'served',0,'ok',NULL,NULL,NULL,1.0,'<think>1 + 1</think> 3 ☃',3,5,0,0,NULL,0.0,0,0,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
INSERT INTO "trajectories" VALUES('t-6',NULL,'run','task','expert',0,'ok',NULL,0.1,1.0,1.0,'<think>1 + 1</think> 3 ☃',3,3,0,0,NULL,0.0,0,0,'eos',0.5,1099511627776,0,'2026-01-31T12:00:00.000001Z');
CREATE TABLE trajectory_tokens (
	trajectory_id VARCHAR(64) NOT NULL, 
	prompt_token_ids BLOB NOT NULL, 
	token_ids BLOB NOT NULL, 
	policy_logprobs BLOB NOT NULL, 
	expert_logprobs BLOB NOT NULL, 
	mixed_logprobs BLOB NOT NULL, 
	entropies BLOB NOT NULL, 
	weights BLOB NOT NULL, 
	sources BLOB NOT NULL, 
	versions BLOB NOT NULL, 
	CONSTRAINT pk_trajectory_tokens PRIMARY KEY (trajectory_id), 
	CONSTRAINT fk_trajectory_tokens_trajectory_id_trajectories FOREIGN KEY(trajectory_id) REFERENCES trajectories (id) ON DELETE CASCADE
);
INSERT INTO "trajectory_tokens" VALUES('t-3',X'0101000003000000010000000200000003000000',X'0101000003000000040000000500000006000000',X'0102000003000000000000BF000080BE000080BF',X'0102000003000000000000000000000000000000',X'0102000003000000000000000000000000000000',X'01020000030000000000003F0000C03F00002040',X'0102000003000000000000000000000000000000',X'0103000003000000000000',X'0101000003000000010000000100000001000000');
INSERT INTO "trajectory_tokens" VALUES('t-6',X'0101000003000000010000000200000003000000',X'0101000003000000040000000500000006000000',X'0102000003000000000000BF000080BE000080BF',X'0102000003000000000000000000000000000000',X'0102000003000000000000000000000000000000',X'01020000030000000000003F0000C03F00002040',X'01020000030000000000803F0000803F0000803F',X'0103000003000000020202',X'0101000003000000000000000000000000000000');
CREATE TABLE updates (
	run_id VARCHAR(64) NOT NULL, 
	step INTEGER NOT NULL, 
	policy_version INTEGER NOT NULL, 
	num_groups INTEGER NOT NULL, 
	num_trajectories INTEGER NOT NULL, 
	num_tokens INTEGER NOT NULL, 
	loss DOUBLE, 
	grad_norm DOUBLE, 
	entropy DOUBLE, 
	clip_fraction_low DOUBLE, 
	clip_fraction_high DOUBLE, 
	mismatch_kl DOUBLE, 
	learning_rate DOUBLE, 
	mean_reward_on_policy DOUBLE, 
	mean_reward_mixed DOUBLE, 
	mean_accuracy_on_policy DOUBLE, 
	mean_accuracy_mixed DOUBLE, 
	frac_reward_zero_std DOUBLE, 
	mean_response_tokens DOUBLE, 
	truncated_share DOUBLE, 
	mean_weight DOUBLE, 
	gated_share DOUBLE, 
	intervention_rate DOUBLE, 
	alpha DOUBLE NOT NULL, 
	gamma DOUBLE NOT NULL, 
	staleness_mean DOUBLE, 
	staleness_max INTEGER, 
	num_stale INTEGER NOT NULL, 
	step_time_s DOUBLE, 
	wait_time_s DOUBLE, 
	created_at DATETIME NOT NULL, effective_sample_share DOUBLE, truncated_weight_share DOUBLE, num_trained_tokens INTEGER, num_skipped_steps INTEGER, token_staleness_mean DOUBLE, num_silent_groups INTEGER, num_left_out INTEGER, 
	CONSTRAINT pk_updates PRIMARY KEY (run_id, step), 
	CONSTRAINT fk_updates_run_id_policy_version_policy_versions FOREIGN KEY(run_id, policy_version) REFERENCES policy_versions (run_id, version), 
	CONSTRAINT fk_updates_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "updates" VALUES('run',1,1,1,2,30,0.125,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0.5,1.25,NULL,0,2,NULL,NULL,'2026-01-31T12:00:00.000001Z',0.5,NULL,NULL,NULL,NULL,NULL,2);
CREATE INDEX ix_evaluations_run_id_suite_metric_policy_version ON evaluations (run_id, suite, metric, policy_version);
CREATE INDEX ix_events_run_id_id ON events (run_id, id);
CREATE INDEX ix_events_run_id_severity_id ON events (run_id, severity, id);
CREATE UNIQUE INDEX uq_policy_versions_live ON policy_versions (run_id) WHERE is_live;
CREATE INDEX ix_tasks_run_id_source_id ON tasks (run_id, source, id);
CREATE INDEX ix_rollout_groups_lease_owner ON rollout_groups (lease_owner);
CREATE INDEX ix_rollout_groups_run_id_consumed_by_step ON rollout_groups (run_id, consumed_by_step);
CREATE INDEX ix_rollout_groups_run_id_created_at ON rollout_groups (run_id, created_at);
CREATE INDEX ix_rollout_groups_run_id_status_id ON rollout_groups (run_id, status, id);
CREATE INDEX ix_rollout_groups_task_id ON rollout_groups (task_id);
CREATE INDEX ix_trajectories_run_id_id ON trajectories (run_id, id);
CREATE INDEX ix_trajectories_run_id_kind_status_min_policy_version ON trajectories (run_id, kind, status, min_policy_version);
CREATE INDEX ix_trajectories_task_id ON trajectories (task_id);
CREATE VIEW v_intervention_rate AS SELECT
    t.run_id,
    t.min_policy_version AS policy_version,
    COUNT(*) AS num_trajectories,
    CAST(SUM(t.num_tokens) AS BIGINT) AS num_tokens,
    CAST(SUM(t.num_gated) AS BIGINT) AS num_gated,
    CAST(SUM(t.num_interventions) AS BIGINT) AS num_interventions,
    CAST(SUM(t.num_gated) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0) AS gated_share,
    CAST(SUM(t.num_interventions) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS intervention_rate,
    CAST(SUM(t.mean_weight * t.num_tokens) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS mean_weight,
    CAST(SUM(t.mean_entropy * t.num_tokens) AS DOUBLE PRECISION) / NULLIF(SUM(t.num_tokens), 0)
        AS mean_entropy
FROM trajectories t
WHERE t.kind = 'mixed' AND t.status = 'ok'
GROUP BY t.run_id, t.min_policy_version;
CREATE VIEW v_intervention_tokens AS SELECT
    t.run_id,
    i.proposed_token_id,
    i.proposed_text,
    i.chosen_token_id,
    i.chosen_text,
    COUNT(*) AS num_interventions,
    CAST(AVG(i.entropy) AS DOUBLE PRECISION) AS mean_entropy,
    CAST(AVG(i.weight) AS DOUBLE PRECISION) AS mean_weight
FROM interventions i
JOIN trajectories t ON t.id = i.trajectory_id
GROUP BY t.run_id, i.proposed_token_id, i.proposed_text, i.chosen_token_id, i.chosen_text;
CREATE VIEW v_pass_rate AS SELECT
    t.run_id,
    t.min_policy_version AS policy_version,
    COUNT(*) AS num_trajectories,
    CAST(SUM(CASE WHEN t.accuracy >= 1 THEN 1 ELSE 0 END) AS BIGINT) AS num_passed,
    CAST(SUM(CASE WHEN t.accuracy >= 1 THEN 1 ELSE 0 END) AS DOUBLE PRECISION) / COUNT(*)
        AS pass_rate,
    CAST(AVG(t.accuracy) AS DOUBLE PRECISION) AS mean_accuracy,
    CAST(AVG(t.reward) AS DOUBLE PRECISION) AS mean_reward,
    CAST(AVG(t.num_tokens) AS DOUBLE PRECISION) AS mean_response_tokens
FROM trajectories t
WHERE t.kind = 'on_policy' AND t.status = 'ok' AND t.accuracy IS NOT NULL
GROUP BY t.run_id, t.min_policy_version;
CREATE VIEW v_staleness AS SELECT
    s.run_id,
    s.step,
    s.policy_version,
    s.staleness,
    COUNT(*) AS num_groups
FROM (
    SELECT
        u.run_id,
        u.step,
        u.policy_version,
        COALESCE(v.parent_version, u.policy_version - 1) - g.min_policy_version AS staleness
    FROM updates u
    JOIN rollout_groups g ON g.run_id = u.run_id AND g.consumed_by_step = u.step
    LEFT JOIN policy_versions v ON v.run_id = u.run_id AND v.version = u.policy_version
) s
GROUP BY s.run_id, s.step, s.policy_version, s.staleness;
CREATE VIEW v_training_curve AS SELECT
    u.run_id,
    r.name AS run_name,
    u.step,
    u.policy_version,
    u.created_at,
    u.mean_reward_on_policy,
    u.mean_reward_mixed,
    u.mean_accuracy_on_policy,
    u.mean_accuracy_mixed,
    u.frac_reward_zero_std,
    u.loss,
    u.grad_norm,
    u.entropy,
    u.clip_fraction_low,
    u.clip_fraction_high,
    u.mismatch_kl,
    u.effective_sample_share,
    u.truncated_weight_share,
    u.num_trained_tokens,
    u.num_skipped_steps,
    u.token_staleness_mean,
    u.num_silent_groups,
    u.num_left_out,
    u.learning_rate,
    u.alpha,
    u.gamma,
    u.mean_weight,
    u.gated_share,
    u.intervention_rate,
    u.mean_response_tokens,
    u.truncated_share,
    u.staleness_mean,
    u.staleness_max,
    u.num_stale,
    u.num_groups,
    u.num_trajectories,
    u.num_tokens,
    u.step_time_s,
    u.wait_time_s
FROM updates u
JOIN runs r ON r.id = u.run_id;
COMMIT;
