def num_counters(batch, num_kv_heads):
    return 64 + batch * num_kv_heads
