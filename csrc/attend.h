/* The whole C ABI of tamis' CPU backend.
 *
 * Plain C, no torch: the library is loaded with ctypes. Every function returns TAMIS_OK or one of the
 * errors below, never throws and never exits. Strides are in elements. Tensors are [batch, heads, seq, dim]
 * unless said otherwise; "dense" arrays are C-contiguous.
 */
#ifndef TAMIS_ATTEND_H
#define TAMIS_ATTEND_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TAMIS_ABI_VERSION 5
#define TAMIS_EXPORT __attribute__((visibility("default")))

enum { TAMIS_OK = 0, TAMIS_NO_MEMORY = 1, TAMIS_CORRUPT_MASK = 2, TAMIS_UNKNOWN_TARGET = 3 };
enum { TAMIS_FP32 = 0, TAMIS_BF16 = 1, TAMIS_FP16 = 2, TAMIS_BOOL = 3 };
enum { TAMIS_PACK_BLOCK = 64 };  /* keys that share a quantisation scale */

typedef struct {
  const void* data; /* NULL: absent */
  int64_t stride[4];
  int32_t dtype;
} tamis_tensor;

/* Which (row, key) pairs exist. Positions and segments are dense int64 [batch or 1, seq]. */
typedef struct {
  int64_t q_len, kv_len;
  int64_t block_q, block_kv;
  int32_t causal;
  int64_t window; /* 0: none; else |q_pos - kv_pos| < window */
  const int64_t* q_pos;
  const int64_t* kv_pos;
  const int64_t* q_seg;
  const int64_t* kv_seg;
  int64_t q_batch_stride, kv_batch_stride; /* of the four above, 0 when shared by the batch */
  /* Per block: pos_min, pos_max, seg_min, seg_max over rows whose segment is not negative; dense
   * [batch or 1, blocks, 4]. Present exactly when any of the four above is. */
  const int64_t* q_bounds;
  const int64_t* kv_bounds;
  int64_t q_bounds_stride, kv_bounds_stride;
  const uint8_t* visible; /* [batch|1, heads|1, q_blocks, kv_blocks] or NULL: all */
  int64_t visible_stride[4];
} tamis_geometry;

/* Quantised key and value, in blocks of 64 keys. C-contiguous; `capacity` blocks are allocated per head. Every `mixed`
 * neighbouring channels of a key, a power of two that divides head_dim, are mixed (mix.h); 1: none are. */
typedef struct {
  int64_t capacity, dim4, mixed; /* dim4: a multiple of 4, not below head_dim; zeros beyond it */
  int8_t* key;            /* [batch, kv_heads, capacity, 64, dim4] */
  float* key_scale;       /* [batch, kv_heads, capacity] */
  int32_t* key_sum;       /* [batch, kv_heads, capacity, 64]: sum of a key's int8 entries */
  int8_t* value;          /* [batch, kv_heads, capacity, value_dim, 64] */
  float* value_scale;     /* [batch, kv_heads, capacity, value_dim] */
  int32_t* value_sum;     /* [batch, kv_heads, capacity, value_dim] */
  float* key_mean;        /* [batch, kv_heads, head_dim] */
} tamis_packed;

typedef struct {
  int64_t batch, heads, kv_heads, head_dim, value_dim;
  tamis_tensor query, key, value; /* key, value: absent where packed is there */
  tamis_packed packed;            /* int8 only; where its key is NULL the call quantises key and value itself */
  const int64_t* pack_segments;   /* then: as in tamis_pack_args */
  int64_t pack_segment_stride;
  tamis_geometry geometry;
  const int32_t* kv_num_blocks; /* NULL: dense */
  const int32_t* kv_indices;
  int64_t num_stride[3], idx_stride[3]; /* batch, head, q block; the last axis of kv_indices is contiguous */
  int64_t max_blocks;
  float scale;
  float softcap; /* 0: none */
  tamis_tensor attn_mask;
  const float* sink_logits;  /* [heads] or NULL */
  const float* pv_threshold; /* [heads] or NULL */
  int32_t int8;
  int32_t bf16_products; /* the target may use them: of value, and of query and key too where all are bf16 */
  void* output; /* dense, dtype of query */
  float* lse;     /* dense [batch, heads, q_len] */
  double* counts; /* dense [batch, heads, q_blocks, 3]: visible, QK done, PV done */
  int32_t threads;
} tamis_attend_args;

typedef struct {
  int64_t batch, heads, seq, dim, block;
  tamis_tensor x;
  const float* mean;       /* dense [batch, heads, dim] or NULL */
  const int64_t* segments; /* dense [batch|1, seq] or NULL */
  int64_t segment_stride;
  const uint8_t* used; /* key_mean only: dense [batch, heads, ceil(seq / 64)] or NULL */
  float* means;        /* summarize: dense [batch, heads, blocks, dim]; key_mean: [batch, heads, dim] */
  float* similarity;   /* summarize only: dense [batch, heads, blocks] */
  int32_t threads;
} tamis_summarize_args;

typedef struct {
  int64_t batch, kv_heads, seq, head_dim, value_dim;
  int64_t first_block; /* where block 0 of key/value goes */
  tamis_tensor key, value;
  const int64_t* segments; /* dense [batch|1, seq] or NULL */
  int64_t segment_stride;
  const uint8_t* used; /* dense [batch, kv_heads, ceil(seq / 64)] or NULL; blocks not used stay unwritten */
  tamis_packed packed;
  int32_t threads;
} tamis_pack_args;

typedef struct {
  int64_t batch, heads, kv_heads, head_dim;
  const float *q_means, *q_similarity; /* dense [batch, heads, q_blocks(, dim)] */
  const float *k_means, *k_similarity; /* dense [batch, kv_heads, kv_blocks(, dim)] */
  float scale;
  const float *cdf, *topk, *similarity; /* [heads]; cdf and topk may be NULL */
  int32_t sink;
  tamis_geometry geometry;
  const uint8_t* must; /* like visible: kept where visible, or NULL */
  int64_t must_stride[4];
  uint64_t* bits;         /* dense [batch, heads, q_blocks, ceil(kv_blocks / 64)] */
  int32_t* kv_num_blocks; /* dense [batch, heads, q_blocks] */
  int32_t threads;
} tamis_select_args;

/* A whole prediction: summaries of query and of key less its mean, and the selection from them. The caller connects the
 * parts: the means of `key_mean` are the mean of `key`, the outputs of `query` and `key` the inputs of `select`. */
typedef struct {
  tamis_summarize_args key_mean, query, key;
  tamis_select_args select;
  int64_t max_blocks; /* out: the largest of kv_num_blocks */
  int32_t threads;    /* of all of it; those of the parts do not matter */
} tamis_predict_args;

TAMIS_EXPORT int tamis_abi_version(void);
/* Targets this processor can run, best first, as "name name ..."; static storage. */
TAMIS_EXPORT const char* tamis_targets(void);
/* Every target that was compiled in, best first; static storage. */
TAMIS_EXPORT const char* tamis_built_targets(void);
/* `target` is one of tamis_targets(); any other name returns TAMIS_UNKNOWN_TARGET. */
TAMIS_EXPORT int tamis_attend(const char* target, const tamis_attend_args* args);
TAMIS_EXPORT int tamis_key_mean(const char* target, const tamis_summarize_args* args);
TAMIS_EXPORT int tamis_summarize(const char* target, const tamis_summarize_args* args);
TAMIS_EXPORT int tamis_pack_kv(const char* target, const tamis_pack_args* args);
/* Which 64-key blocks some query block of a key head's group keeps and may see: [batch, kv_heads, ceil(kv_len / 64)]. */
TAMIS_EXPORT int tamis_used_blocks(const tamis_attend_args* args, uint8_t* used);
TAMIS_EXPORT int tamis_select(const char* target, const tamis_select_args* args);
TAMIS_EXPORT int tamis_predict(const char* target, tamis_predict_args* args);
/* Bits of tamis_select into ascending indices, [rows, max_blocks]; the tail is filled with -1. */
TAMIS_EXPORT int tamis_expand(const uint64_t* bits, int64_t rows, int64_t kv_blocks, int64_t max_blocks,
                              int32_t* kv_indices, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
