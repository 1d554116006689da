/* Window attention, there and back, for one image and one head after the other: windows are gathered, multiplied and put
   back in the cache. Maps are contiguous: qk (B, H, W, 2 C), the others (B, H, W, M). */
#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIRS 1 /* products of bfloat16, two at a time */
#else
#define PAIRS 0
#endif
#define MR (VL == 16 ? 8 : 4) /* rows of a tile of a product; they and two vectors of columns stay in registers */
#define ROUND(n) (((n) + VL - 1) / VL * VL)
#define PITCH(n) (ROUND(n) + VL) /* rows this far apart do not meet in the same sets of the cache */

typedef struct {
    const void *qk, *z, *grad; /* grad: of the result, or NULL in a forward pass */
    void *out, *grad_qk, *grad_z;
    int half, act, heads, batch, height, width, h, w, near, far, repeat, C, M, next, failed;
} Attention;

INLINE vf mac(int pairs, vf sum, float a, vf b) {
#if PAIRS
    if (pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
    return sum + a * b;
}

/* rows x (2 or 1 vectors) of C (+)= A B in registers. */
INLINE void tile(int pairs, int rows, int vectors, int K, const float *A, long as, long ak, const float *B, long bs,
                 float **C, int add) {
    vf sum[MR][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? load(C[i] + j * VL) : (vf){0};
    for (int k = 0; k < K; k++) {
        vf b[2];
        for (int j = 0; j < vectors; j++) b[j] = load(B + k * bs + j * VL);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] = mac(pairs, sum[i][j], A[i * as + k * ak], b[j]);
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) store(C[i] + j * VL, sum[i][j]);
}

INLINE void multiply(int pairs, int M, int N, int K, const float *A, long as, long ak, const float *B, long bs,
                     float *C, long cs, const int *row, int add) {
    for (int n = 0; n < N; n += 2 * VL)
        for (int m = 0; m < M;) {
            float *rows[MR];
            int full = M - m >= MR, wide = N - n > VL;
            for (int i = 0; i < (full ? MR : 1); i++) rows[i] = C + (row ? row[m + i] : m + i) * cs + n;
            if (full && wide) tile(pairs, MR, 2, K, A + m * as, as, ak, B + n, bs, rows, add);
            else if (full) tile(pairs, MR, 1, K, A + m * as, as, ak, B + n, bs, rows, add);
            else if (wide) tile(pairs, 1, 2, K, A + m * as, as, ak, B + n, bs, rows, add);
            else tile(pairs, 1, 1, K, A + m * as, as, ak, B + n, bs, rows, add);
            m += full ? MR : 1;
        }
}

/* Rows `row` of C (+)= A B. A: M x K, of strides as and ak. B: K x N, and N is rounded up to vectors. With pairs, two
   bfloat16 along K are an element of A and of B. */
static void product(int pairs, int M, int N, int K, const float *A, long as, long ak, const float *B, long bs,
                    float *C, long cs, const int *row, int add) {
    if (PAIRS && pairs) multiply(1, M, N, (K + 1) / 2, A, as, ak, B, bs, C, cs, row, add);
    else multiply(0, M, N, K, A, as, ak, B, bs, C, cs, row, add);
}

/* With pairs, a matrix in bfloat16 with pairs along its rows, in its own place. */
static float *across(int pairs, float *x, int T, int n, long pitch) {
    for (int i = 0; pairs && i < T; i++)
        for (int j = 0; j < n; j += VL) *(vh *)((uint16_t *)(x + i * pitch) + j) = narrow(load(x + i * pitch + j));
    return x;
}

/* With pairs, a matrix in bfloat16 with pairs down its columns. */
static float *down(int pairs, float *x, int T, int n, long pitch, float *to) {
    for (int i = 0; pairs && i < T; i += 2)
        for (int j = 0; j < n; j += VL) {
            vf a = load(x + i * pitch + j), b = i + 1 < T ? load(x + (i + 1) * pitch + j) : (vf){0};
            store(to + i / 2 * pitch + j, (vf)((vw)widen(narrow(a)) >> 16 | (vw)widen(narrow(b))));
        }
    return pairs ? to : x;
}

static void transpose(int M, int N, const float *x, long xs, float *y, long ys) {
    for (int n = 0; n < N; n += VL)
        for (int m = 0; m < M; m += VL) {
            vf r[VL];
            for (int i = 0; i < VL; i++) r[i] = m + i < M ? load(x + (m + i) * xs + n) : (vf){0};
#ifdef __clang__
            for (int i = 0; i < VL; i++)
                for (int j = 0; j < VL; j++) y[(n + j) * ys + m + i] = r[i][j];
#else
            vi lane;
            for (int i = 0; i < VL; i++) lane[i] = i;
            for (int s = 1; s < VL; s *= 2) { /* exchange blocks of s x s */
                vi odd = (lane & s) != 0, low = lane + (odd & (VL - s)), high = lane + (odd & VL) + (~odd & s);
                for (int i = 0; i < VL; i++)
                    if (!(i & s)) {
                        vf a = r[i], b = r[i + s];
                        r[i] = __builtin_shuffle(a, b, low);
                        r[i + s] = __builtin_shuffle(a, b, high);
                    }
            }
            for (int i = 0; i < VL; i++) store(y + (n + i) * ys + m, r[i]);
#endif
        }
}

/* Tokens of a map, from `first` on in float32 and activated: those of `row`, or all. */
static void gather(float *to, const void *map, long first, long stride, int half, const int *row, int T, int n,
                   int act) {
    vf slope;
    for (int i = 0; i < T; i++)
        for (int j = 0; j < n; j += VL) {
            const char *from = item(map, first + (row ? row[i] : i) * stride + j, half);
            store(to + i * PITCH(n) + j, activate(get(from, n - j, half), act, &slope));
        }
}

static void softmax(float *S, int T, float scale, float repeat) {
    for (float *s = S; s < S + T * PITCH(T); s += PITCH(T)) {
        for (int j = T; j < ROUND(T); j++) s[j] = -1e30f;
        vf most = load(s), sum = {0};
        for (int j = VL; j < T; j += VL) most = pick(load(s + j) > most, load(s + j), most);
        float top = most[0];
        for (int j = 1; j < VL; j++) top = most[j] > top ? most[j] : top;
        for (int j = 0; j < T; j += VL) {
            vf e = vexp(scale * (load(s + j) - top));
            for (int l = T - j; l < VL; l++) e[l] = 0;
            sum += e;
            store(s + j, e);
        }
        float factor = repeat / total(sum);
        for (int j = 0; j < T; j += VL) store(s + j, factor * load(s + j));
    }
}

/* grad becomes the gradient of the logits. */
static void softmax_back(float *grad, const float *S, int T) {
    for (long i = 0; i < T * PITCH(T); i += PITCH(T)) {
        vf dot = {0};
        for (int j = 0; j < T; j += VL) dot += load(S + i + j) * load(grad + i + j);
        float mean = total(dot);
        for (int j = 0; j < T; j += VL) store(grad + i + j, load(S + i + j) * (load(grad + i + j) - mean));
    }
}

static void attend_head(const Attention *a, int image, int head, float *room) {
    const int T = a->h * a->w, d = a->C / a->heads, e = a->M / a->heads, tokens = a->height * a->width;
    const int n = a->height / a->h, m = a->width / a->w, half = a->half, back = a->grad != NULL;
    const int pairs = PAIRS && half && d % 2 == 0 && e % 2 == 0, deep = pairs ? 2 : 1;
    const long ds = PITCH(d), es = PITCH(e), ts = PITCH(T), first = (long)image * tokens, qs = 2 * a->C;
    const long q0 = first * qs + head * d, k0 = q0 + a->C, z0 = first * a->M + head * e;
    const float scale = 1 / __builtin_sqrtf(d), repeat = a->repeat;
#define TAKE(n) (room += (n), room - (n))
    float *Q = TAKE(T * ds), *K = TAKE(T * ds), *Qd = TAKE(T * ds), *Kd = TAKE(T * ds), *KT = TAKE(ROUND(d) * ts);
    float *S = TAKE(T * ts), *dS = TAKE(T * ts), *Sd = TAKE(T * ts), *VT = TAKE(ROUND(e) * ts);
    float *V = TAKE(T * es), *G = TAKE(T * es), *Vd = TAKE(T * es), *values = TAKE(tokens * es);
    float *sums = TAKE(tokens * es), *dQ = TAKE(tokens * ds), *dK = TAKE(tokens * ds), *x;
    int row[T], add = 0;
    vf slope;
    gather(values, a->z, z0, a->M, half, NULL, tokens, e, a->act);
    for (int i = a->near ? 0 : n * m; i < (a->far ? 2 : 1) * n * m; i++, add = i >= n * m && a->near) {
        int far = i / (n * m), y0 = i % (n * m) / m, x0 = i % m;
        for (int t = 0; t < T; t++) {
            int y = t / a->w, x = t % a->w;
            row[t] = far ? (y * n + y0) * a->width + x * m + x0 : (y0 * a->h + y) * a->width + x0 * a->w + x;
        }
        gather(Q, a->qk, q0, qs, half, row, T, d, NONE);
        gather(K, a->qk, k0, qs, half, row, T, d, NONE);
        gather(V, values, 0, es, 0, row, T, e, NONE);
        float *Qp = back ? down(pairs, Q, T, d, ds, Qd) : Q, *Kp = back ? down(pairs, K, T, d, ds, Kd) : K;
        transpose(T, d / deep, across(pairs, K, T, d, ds), ds, KT, ts);
        product(pairs, T, T, d, across(pairs, Q, T, d, ds), ds, 1, KT, ts, S, ts, NULL, 0);
        softmax(S, T, scale, back ? 1 : repeat);
        if (!back) {
            x = down(pairs, V, T, e, es, Vd);
            product(pairs, T, e, T, across(pairs, S, T, T, ts), ts, 1, x, es, sums, es, row, add);
            continue;
        }
        gather(G, a->grad, z0, a->M, half, row, T, e, NONE);
        x = down(pairs, G, T, e, es, Vd);
        product(pairs, T, e, T, down(pairs, S, T, T, ts, Sd), 1, ts, x, es, sums, es, row, add);
        transpose(T, e / deep, across(pairs, V, T, e, es), es, VT, ts);
        product(pairs, T, T, e, across(pairs, G, T, e, es), es, 1, VT, ts, dS, ts, NULL, 0);
        softmax_back(dS, S, T);
        product(pairs, T, d, T, down(pairs, dS, T, T, ts, Sd), 1, ts, Qp, ds, dK, ds, row, add);
        product(pairs, T, d, T, across(pairs, dS, T, T, ts), ts, 1, Kp, ds, dQ, ds, row, add);
    }
    for (long t = 0; t < tokens; t++) {
        long at = z0 + t * a->M;
        for (int j = 0; j < e; j += VL) {
            if (back) activate(get(item(a->z, at + j, half), e - j, half), a->act, &slope);
            vf sum = load(sums + t * es + j);
            put(item(back ? a->grad_z : a->out, at + j, half), e - j, half, back ? repeat * sum * slope : sum);
        }
        for (int j = 0; back && j < d; j += VL) {
            put(item(a->grad_qk, q0 + t * qs + j, half), d - j, half, repeat * scale * load(dQ + t * ds + j));
            put(item(a->grad_qk, k0 + t * qs + j, half), d - j, half, repeat * scale * load(dK + t * ds + j));
        }
    }
}

static void attend_some(void *given) {
    Attention *a = given;
    long T = a->h * a->w, tokens = a->height * a->width, ds = PITCH(a->C / a->heads), es = PITCH(a->M / a->heads);
    long size = (ds + es) * (4 * T + PITCH(T) + 2 * tokens) + 3 * T * PITCH(T);
    float *room = aligned_alloc(64, (4 * size + 63) / 64 * 64);
    if (!room) a->failed = 1;
    for (int i; room && (i = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->batch * a->heads;)
        attend_head(a, i / a->heads, i % a->heads, room);
    free(room);
}

int d_emo_attention(Attention *a, team *parallel, int threads) {
    if (threads > 1) parallel(attend_some, a, threads, 0);
    else attend_some(a);
    return a->failed;
}
