/* Vectors of float32, as GCC and Clang have them for every CPU; maps in memory are float32 or (half) bfloat16. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef float vu __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vw __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL), aligned(2), may_alias));

typedef void team(void (*)(void *), void *, unsigned, unsigned); /* OpenMP's: run a function in so many threads */

INLINE vf load(const float *p) { return *(const vu *)p; }
INLINE void store(float *p, vf x) { *(vu *)p = x; }
INLINE vf all(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE float total(vf x) {
    float s = 0;
    for (int i = 0; i < VL; i++) s += x[i];
    return s;
}

/* The upper half of each element, rounded to the nearest even. */
INLINE vh narrow(vf x) {
    vw bits = (vw)x;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

INLINE vf widen(vh x) { return (vf)(__builtin_convertvector(x, vw) << 16); }

INLINE char *item(const void *map, long i, int half) { return (char *)map + i * (half ? 2 : 4); }

/* The first n elements, at most a vector's. */
INLINE vf get(const char *p, long n, int half) {
    float x[VL] = {0};
    uint16_t y[VL] = {0};
    if (n >= VL) return half ? widen(*(const vh *)p) : load((const float *)p);
    if (!half) return memcpy(x, p, 4 * n), load(x);
    return memcpy(y, p, 2 * n), widen(*(vh *)y);
}

INLINE void put(char *p, long n, int half, vf x) {
    vh low = narrow(x);
    if (n > VL) n = VL;
    if (half && n == VL) *(vh *)p = low;
    else if (half) memcpy(p, &low, 2 * n);
    else if (n == VL) store((float *)p, x);
    else memcpy(p, &x, 4 * n);
}

INLINE vf vexp(vf x) { /* 2^k e^r, |r| <= ln 2 / 2; not a number stays one */
    x = pick(x < -87.f, all(-87.f), x);
    x = pick(x > 88.f, all(88.f), x);
    vf k = (x * 1.44269504f + 12582912.f) - 12582912.f;
    vf r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vf y = r * (1.f / 720) + 1.f / 120;
    y = y * r + 1.f / 24;
    y = y * r + 1.f / 6;
    y = y * r + .5f;
    y = y * r * r + r + 1.f;
    return (vf)((vi)y + (__builtin_convertvector(k, vi) << 23));
}

/* The normal distribution's P(X < x) by exp(-x^2/2) u Q(u), u = 1 / (1 + 0.26 |x|); Q fitted to a relative 2e-8. */
INLINE vf normal(vf x, vf bell) {
    vf t = pick(x < 0.f, -x, x), u = 1.f / (1.f + .26f * t);
    vf y = all(3.078369459e-02f);
    y = y * u - 1.541897907e-01f;
    y = y * u + 2.543187887e-01f;
    y = y * u - 1.542074077e-01f;
    y = y * u + 1.632210238e-01f;
    y = y * u + 5.004674831e-02f;
    y = y * u + 1.032854612e-01f;
    y = y * u + 1.029802088e-01f;
    y = (y * u + 1.037612622e-01f) * u * bell;
    return pick(x < 0.f, y, 1.f - y);
}

enum { NONE, GELU, SILU };

/* An activation, and its derivative. */
INLINE vf activate(vf x, int act, vf *slope) {
    if (act == NONE) return *slope = all(1.f), x;
    if (act == GELU) {
        vf bell = vexp(-.5f * x * x), below = normal(x, bell);
        *slope = below + x * bell * .398942280f;
        return x * below;
    }
    vf s = 1.f / (1.f + vexp(-x));
    *slope = s * (1.f + x * (1.f - s));
    return x * s;
}
