"""Backends: each offers key_mean, summarize, select, pack_kv and attend for one kind of device."""
