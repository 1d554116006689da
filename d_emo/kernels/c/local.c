/* The local branch's steps, c = DWConv(a) and y = a + SiLU((c - mean) factor + beta), there and back, for some channels
   of an image after the other. Maps are contiguous, (B, H, W, M), and vectors divide M. */
#include "vectors.h"

enum { CONVOLVE, SKIP, SKIP_BACK, CONVOLVE_BACK };

typedef struct {
    const void *a, *given, *grad;                       /* given: c, once it is there; grad: of y */
    void *c, *y, *grad_a;                               /* what CONVOLVE, SKIP and SKIP_BACK, CONVOLVE_BACK make */
    const float *kernel, *mean, *factor, *beta, *u, *v; /* k k M, then M each: grad c = factor grad SiLU + u + v (c - mean) */
    float *sums;                                        /* B x (2, or k k) x M */
    int half, batch, height, width, M, k, step, next, failed;
} Local;

/* n neighbours in a row of a convolution. */
INLINE void taps(int n, int k, const float *in, long pitch, const float *kernel, long stride, int flip, vf *sum) {
    for (int x = 0; x < n; x++) sum[x] = (vf){0};
    for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++) {
            int t = i * k + j;
            vf tap = load(kernel + (flip ? k * k - 1 - t : t) * stride);
            for (int x = 0; x < n; x++) sum[x] += tap * load(in + i * pitch + (j + x) * VL);
        }
}

/* The gradient of the kernel, one row of it at a time. */
INLINE void correlate(int k, int H, int W, const float *in, const float *grad, long pitch, float *sums, long stride) {
    for (int i = 0; i < k; i++) {
        vf sum[7] = {0};
        for (int y = 0; y < H; y++)
            for (int x = 0; x < W; x++) {
                vf g = load(grad + (y + k / 2) * pitch + (x + k / 2) * VL);
                for (int j = 0; j < k; j++) sum[j] += g * load(in + (y + i) * pitch + (x + j) * VL);
            }
        for (int j = 0; j < k; j++) store(sums + (i * k + j) * stride, sum[j]);
    }
}

/* in and outer: (H + k - 1) x (W + k - 1) vectors with a border of zeros. */
static void local_block(const Local *l, int image, int m, float *in, float *outer) {
    const int H = l->height, W = l->width, M = l->M, k = l->k, half = l->half, step = l->step;
    const int convolve = step == CONVOLVE || step == CONVOLVE_BACK;
    const long pitch = (W + k - 1) * VL, first = (long)image * H * W * M + m;
    vf mean = {0}, factor = {0}, beta = {0}, one = {0}, two = {0}, slope;
    if (step != CONVOLVE) mean = load(l->mean + m), factor = load(l->factor + m), beta = load(l->beta + m);
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++) {
            long at = first + ((long)y * W + x) * M, place = (y + k / 2) * pitch + (x + k / 2) * VL;
            vf a = get(item(l->a, at, half), VL, half);
            if (convolve) store(in + place, a);
            if (step == CONVOLVE) continue;
            vf c = get(item(l->given, at, half), VL, half) - mean, local = activate(c * factor + beta, SILU, &slope);
            if (step != CONVOLVE_BACK) put(item(l->y, at, half), VL, half, a + local);
            if (step == SKIP) continue;
            vf inner = slope * get(item(l->grad, at, half), VL, half);
            if (step == SKIP_BACK) one += inner, two += inner * c;
            else store(outer + place, factor * inner + load(l->u + m) + load(l->v + m) * c);
        }
    if (step == CONVOLVE_BACK) {
        float *sums = l->sums + (long)image * k * k * M + m;
        if (k == 3) correlate(3, H, W, in, outer, pitch, sums, M);
        else if (k == 5) correlate(5, H, W, in, outer, pitch, sums, M);
        else correlate(7, H, W, in, outer, pitch, sums, M);
    }
    for (int y = 0; convolve && y < H; y++)
        for (int x = 0, n; x < W; x += n) {
            int back = step == CONVOLVE_BACK;
            const float *from = (back ? outer : in) + y * pitch + x * VL;
            vf sum[8];
            n = W - x >= 8 ? 8 : W - x >= 4 ? 4 : 1;
            if (n == 8) taps(8, k, from, pitch, l->kernel + m, M, back, sum);
            else if (n == 4) taps(4, k, from, pitch, l->kernel + m, M, back, sum);
            else taps(1, k, from, pitch, l->kernel + m, M, back, sum);
            for (int i = 0; i < n; i++) {
                long at = first + ((long)y * W + x + i) * M;
                if (back) sum[i] += get(item(l->grad, at, half), VL, half);
                else store(outer + (y * W + x + i) * VL, sum[i]);
                put(item(back ? l->grad_a : l->c, at, half), VL, half, sum[i]);
            }
        }
    if (step == CONVOLVE) { /* mean, and squared differences from it */
        for (int i = 0; i < H * W; i++) one += load(outer + i * VL);
        one /= (float)(H * W);
        for (int i = 0; i < H * W; i++) {
            vf far = load(outer + i * VL) - one;
            two += far * far;
        }
    }
    if (step == CONVOLVE || step == SKIP_BACK) {
        store(l->sums + (2L * image) * M + m, one);
        store(l->sums + (2L * image + 1) * M + m, two);
    }
}

static void local_some(void *given) {
    Local *l = given;
    const int blocks = (l->M / VL + 3) / 4; /* of four vectors, adjacent in memory */
    long size = (l->height + l->k - 1) * (l->width + l->k - 1) * VL;
    float *room = aligned_alloc(64, (8 * size + 63) / 64 * 64);
    if (room) memset(room, 0, 8 * size);
    else l->failed = 1;
    for (int i; room && (i = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->batch * blocks;)
        for (int m = i % blocks * 4 * VL, j = 0; j < 4 && m < l->M; j++, m += VL)
            local_block(l, i / blocks, m, room, room + size);
    free(room);
}

int d_emo_local(Local *l, team *parallel, int threads) {
    if (threads > 1) parallel(local_some, l, threads, 0);
    else local_some(l);
    return l->failed;
}

int d_emo_lanes(void) { return VL; }
