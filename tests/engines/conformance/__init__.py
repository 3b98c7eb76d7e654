"""What every engine must do, checked through its public interface only.

An engine joins by one entry in `cases.CASES`. `response_tree` enumerates pi_mix with plain
transformers and numpy, `comparison` holds the statistics, `reference_samplers` samplers that are
right or wrong in one known way, to show what the statistics can see.
"""
