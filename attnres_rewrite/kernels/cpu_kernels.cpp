// The kernels of all operations for a CPU; cpu_library.py compiles them, once for each Scalar, the dtype of the rows,
// and each cpu.py calls its own.
//
// T tokens, N sources, Q queries, D channels. A token is done whole, and its rows stay in the cache meanwhile: those of
// the tensors as they are, widened to float32 each time they are read, for they take half the room; what is made of them
// in rows of P floats, P being D rounded up to whole pairs of vectors and the rest zero. Every loop takes a pair of vectors
// a turn, which is one vector of 16 bits, and whoever reads a row first asks for the same of the next token. Gradients
// that sum over tokens are summed for each of num_chunks runs of tokens, whose number does not depend on that of the
// threads, and those in their order: the same bits in every run.
//
// The formulas are those of the Triton kernels beside each cpu.py.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

// without a name, so that calls need not go through the table of a shared library, and are inlined
namespace {

using Scalar = ATTNRES_SCALAR;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
// sums and rows stay in registers only where all that a loop calls is inlined, which compilers decide by size
#define ATTNRES_KERNEL __attribute__((flatten)) void
// outputs of one loop: so many sums stay in registers
constexpr int GROUP = 4;
// vectors that are added up as they come, before their sum is added to that of all by Kahan's method
constexpr int64_t RUN = 16;

// two vectors: of channels d ... and d + LANES ...
struct Pair {
  Vec low, high;
};

Pair operator+(const Pair& a, const Pair& b) { return {a.low + b.low, a.high + b.high}; }
Pair operator-(const Pair& a, const Pair& b) { return {a.low - b.low, a.high - b.high}; }
Pair operator*(const Pair& a, const Pair& b) { return {a.low * b.low, a.high * b.high}; }
Pair operator*(const Vec& a, const Pair& b) { return {a * b.low, a * b.high}; }

// a * b + c
Pair fmadd(const Pair& a, const Pair& b, const Pair& c) {
  return {at::vec::fmadd(a.low, b.low, c.low), at::vec::fmadd(a.high, b.high, c.high)};
}
Pair fmadd(const Vec& a, const Pair& b, const Pair& c) {
  return {at::vec::fmadd(a, b.low, c.low), at::vec::fmadd(a, b.high, c.high)};
}

constexpr int64_t PAIR = 2 * LANES;
// channels that several loops go over before the next ones
constexpr int64_t BLOCK = 8 * PAIR;

template <typename Kind>
using Narrow = std::conditional_t<std::is_same_v<Kind, float>, Pair, at::vec::Vectorized<Kind>>;

// what `value` becomes in a row of this kind
template <typename Kind>
Narrow<Kind> narrow(const Pair& value) {
  if constexpr (std::is_same_v<Kind, float>) {
    return value;
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (std::is_same_v<Kind, c10::BFloat16>) {
    // one instruction for ten; it takes what is below 1.2e-38 for zero
    return __m512i(_mm512_cvtne2ps_pbh(value.high, value.low));
#endif
  } else {
    return at::vec::convert_from_float<Kind>(value.low, value.high);
  }
}

template <typename Kind>
Pair widen(const Narrow<Kind>& value) {
  if constexpr (std::is_same_v<Kind, float>) {
    return value;
#if defined(CPU_CAPABILITY_AVX512)
  } else if constexpr (std::is_same_v<Kind, c10::BFloat16>) {
    // the tuple that convert_to_float returns goes through memory
    const auto half = [](__m256i bits) {
      return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
    };
    const __m512i both = value;
    return {half(_mm512_castsi512_si256(both)), half(_mm512_extracti64x4_epi64(both, 1))};
#endif
  } else {
    const auto [low, high] = at::vec::convert_to_float<Kind>(value);
    return {low, high};
  }
}

Pair pair_at(const float* from) { return {Vec::loadu(from), Vec::loadu(from + LANES)}; }

void put(const Pair& value, float* to) {
  value.low.store(to);
  value.high.store(to + LANES);
}

// the first `left` of them from a row of any kind, and zeros
template <typename Kind>
Pair pair_of(const Kind* from, int64_t left) {
  if constexpr (std::is_same_v<Kind, float>) {
    if (left >= PAIR) return pair_at(from);
    const int64_t high = left - LANES;
    return {Vec::loadu(from, std::min(left, LANES)), high > 0 ? Vec::loadu(from + LANES, high) : Vec(0.0f)};
  } else {
    return widen<Kind>(Narrow<Kind>::loadu(from, std::min(left, PAIR)));
  }
}

template <typename Kind>
void put_narrow(const Narrow<Kind>& value, Kind* to, int64_t left) {
  if constexpr (std::is_same_v<Kind, float>) {
    value.low.store(to, std::min(left, LANES));
    if (left > LANES) value.high.store(to + LANES, std::min(left - LANES, LANES));
  } else {
    value.store(to, std::min(left, PAIR));
  }
}

// channels d ... of a token, into its row of a tensor whose next row is the next token's: that is asked for meanwhile, as
// what is written has to come first
void put_row(const Pair& value, Scalar* row, int64_t d, int64_t width) {
  put_narrow(narrow<Scalar>(value), row + d, width - d);
  __builtin_prefetch(row + width + d, 1);
  if constexpr (sizeof(Scalar) == 4) __builtin_prefetch(row + width + d + LANES, 1);
}

// the channels of one token in one tensor
template <typename Kind>
struct Row {
  const Kind *here, *next;  // next: of the token after it
  int64_t width;

  // asks for the next one meanwhile: a core does not by itself for so many tensors, and asked for at once they block it
  Pair first(int64_t d) const {
    __builtin_prefetch(next + d);
    if constexpr (sizeof(Kind) == 4) __builtin_prefetch(next + d + LANES);
    return again(d);
  }
  Pair again(int64_t d) const { return pair_of(here + d, width - d); }
};

// where the rows of several tensors start; see rows.py
struct Rows {
  const void* const* tensors;
  const int64_t* strides;
  const int64_t* sizes;
  int64_t rank;

  template <typename Kind>
  const Kind* start(int64_t tensor, int64_t token) const {
    const int64_t* stride = strides + tensor * rank;
    int64_t start = 0;
    for (int64_t dim = rank - 1; dim > 0; dim--) {
      start += token % sizes[dim - 1] * stride[dim];
      token /= sizes[dim - 1];
    }
    return static_cast<const Kind*>(tensors[tensor]) + start + token * stride[0];
  }

  template <typename Kind = Scalar>
  Row<Kind> row(int64_t tensor, int64_t token, int64_t num_tokens, int64_t width) const {
    return {start<Kind>(tensor, token), start<Kind>(tensor, std::min(token + 1, num_tokens - 1)), width};
  }
};

// rows of P floats in the cache of one thread
struct Tile {
  int64_t width, padded;
  std::vector<float> values;

  Tile(int64_t rows, int64_t width)
      : width(width), padded((width + PAIR - 1) / PAIR * PAIR), values(rows * padded, 0.0f) {}

  float* operator[](int64_t row) { return values.data() + row * padded; }

  template <typename Kind>
  void load(int64_t row, const Row<Kind>& from) {
    float* to = (*this)[row];
    for (int64_t d = 0; d < padded; d += PAIR) put(from.first(d), to + d);
  }

  void load(int64_t row, const float* from) { std::copy_n(from, width, (*this)[row]); }

  void store(int64_t row, float* to) { std::copy_n((*this)[row], width, to); }
};

float total_of(Vec sum) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
}

// step(k) for k < K, each a constant: an array that only constants index stays in registers
template <int K, typename Step>
void each(Step step) {
  [&]<int... k>(std::integer_sequence<int, k...>){
    (step(std::integral_constant<int, k>()), ...);
  }(std::make_integer_sequence<int, K>());
}

// out[k] = the sum over d of what add(d, sums) adds to sums[k]
template <int K, typename Add>
void sum_up(int64_t padded, float* out, Add add) {
  Vec sums[K], lost[K];
  each<K>([&](auto k) { sums[k] = lost[k] = Vec(0.0f); });
  for (int64_t first = 0; first < padded; first += RUN * LANES) {
    Pair here[K];
    each<K>([&](auto k) { here[k] = {Vec(0.0f), Vec(0.0f)}; });
    for (int64_t d = first; d < std::min(first + RUN * LANES, padded); d += PAIR) add(d, here);
    each<K>([&](auto k) {
      const Vec run = here[k].low + here[k].high - lost[k], next = sums[k] + run;
      lost[k] = next - sums[k] - run;
      sums[k] = next;
    });
  }
  each<K>([&](auto k) { out[k] = total_of(sums[k]); });
}

// call<K>(first) for groups of K = GROUP, and of the rest
template <typename Call>
void in_groups(int64_t count, Call call) {
  int64_t first = 0;
  for (; count - first >= GROUP; first += GROUP) call(std::integral_constant<int, GROUP>(), first);
  if (count - first == 3) call(std::integral_constant<int, 3>(), first);
  if (count - first == 2) call(std::integral_constant<int, 2>(), first);
  if (count - first == 1) call(std::integral_constant<int, 1>(), first);
}

// outs(k, d, start(k, d) + sum over i < count of factors[k * count + i] * at(i, d)), for every k < num and d of [from, to)
template <typename At, typename Start, typename Out>
void combine(At at, int64_t count, const float* factors, int64_t from, int64_t to, int64_t num, Start start, Out out) {
  in_groups(num, [&](auto size, int64_t first) {
    constexpr int K = size;
    const float* own = factors + first * count;
    for (int64_t d = from; d < to; d += PAIR) {
      Pair sums[K];
      each<K>([&](auto k) { sums[k] = start(first + k, d); });
      for (int64_t i = 0; i < count; i++) {
        const Pair here = at(i, d);
        each<K>([&](auto k) { sums[k] = fmadd(Vec(own[k * count + i]), here, sums[k]); });
      }
      each<K>([&](auto k) { out(first + k, d, sums[k]); });
    }
  });
}

// found[q] = row . against[q] for q < count, and found[count] = row . row
void dots(const Row<Scalar>& row, int64_t padded, const float* const* against, int64_t count, float* found) {
  in_groups(count, [&](auto size, int64_t first) {
    constexpr int K = size;
    float sums_of_group[K + 1];
    // captured by value: what the loop stores might else have changed them
    std::array<const float*, K> own;
    std::copy_n(against + first, K, own.begin());
    sum_up<K + 1>(padded, sums_of_group, [=](int64_t d, Pair* sums) {
      const Pair here = row.first(d);
      each<K>([&](auto k) { sums[k] = fmadd(here, pair_at(own[k] + d), sums[k]); });
      sums[K] = fmadd(here, here, sums[K]);
    });
    std::copy_n(sums_of_group, K + 1, found + first);
  });
}

// out[i] = the sum of parts[chunk, i] over the chunks in their order, by Kahan's method; within a parallel region
void sum_chunks(const float* parts, int64_t num_chunks, int64_t length, float* out) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < length; first += LANES) {
    const int64_t left = std::min(length - first, LANES);
    Vec sum(0.0f), lost(0.0f);
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
      const Vec part = Vec::loadu(parts + chunk * length + first, left) - lost, next = sum + part;
      lost = next - sum - part;
      sum = next;
    }
    sum.store(out + first, left);
  }
}

std::vector<const float*> pointers(Tile& tile, int64_t count) {
  std::vector<const float*> found(count);
  for (int64_t row = 0; row < count; row++) found[row] = tile[row];
  return found;
}

// weights [Q, N] of one token from its logits [N, Q]; lse[q * lse_stride], where it is asked for
void softmax(
    const float* logit, int64_t num_sources, int64_t num_queries, float* weights, float* lse, int64_t lse_stride) {
  const int64_t N = num_sources, Q = num_queries;
  for (int64_t q = 0; q < Q; q++) {
    float top = logit[q];
    // the second comparison keeps what is not a number
    for (int64_t n = 1; n < N; n++) {
      float here = logit[n * Q + q];
      if (here > top || here != here) top = here;
    }
    for (int64_t n = 0; n < N; n++) weights[q * N + n] = logit[n * Q + q] - top;
    if (lse != nullptr) lse[q * lse_stride] = top;
  }
  at::vec::map<float>([](Vec x) { return x.exp(); }, weights, weights, Q * N);
  for (int64_t q = 0; q < Q; q++) {
    float* weight = weights + q * N;
    double total = 0.0;
    for (int64_t n = 0; n < N; n++) total += weight[n];
    const double share = 1.0 / total;
    for (int64_t n = 0; n < N; n++) weight[n] *= share;
    if (lse != nullptr) lse[q * lse_stride] += float(std::log(total));
  }
}

struct Mix {
  Rows sources;
  const float* probes;  // [Q, D]; null: the logits are given
  float* rstd;          // [T, N]
  float* logit;         // [T, N, Q]
  void* const* outs;    // Q of [T, D]; null: only the logits
  float* lse;           // [Q, T], or null
  int64_t num_tokens, num_sources, num_queries, width;
  float eps;
  const float* factors;  // Q, of the mixes
};

ATTNRES_KERNEL mix(const Mix& args, int num_threads) {
  const int64_t N = args.num_sources, Q = args.num_queries, D = args.width, T = args.num_tokens;
#pragma omp parallel num_threads(num_threads)
  {
    const bool has_probes = args.probes != nullptr, has_outs = args.outs != nullptr;
    Tile probes(Q, D);
    std::vector<float> weights(Q * N), found(Q + 1);
    std::vector<Row<Scalar>> rows(N);
    const std::vector<const float*> against = pointers(probes, Q);
    for (int64_t q = 0; has_probes && q < Q; q++) probes.load(q, args.probes + q * D);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
      float* logit = args.logit + t * N * Q;
      for (int64_t n = 0; n < N; n++) rows[n] = args.sources.row(n, t, T, D);
      for (int64_t n = 0; has_probes && n < N; n++) {
        dots(rows[n], probes.padded, against.data(), Q, found.data());
        const double rstd = 1.0 / std::sqrt(double(found[Q]) / D + args.eps);
        args.rstd[t * N + n] = rstd;
        for (int64_t q = 0; q < Q; q++) logit[n * Q + q] = found[q] * rstd;
      }
      if (!has_outs) continue;
      softmax(logit, N, Q, weights.data(), args.lse == nullptr ? nullptr : args.lse + t, T);
      for (int64_t q = 0; q < Q; q++)
        for (int64_t n = 0; n < N; n++) weights[q * N + n] *= args.factors[q];
      combine(
          [&](int64_t n, int64_t d) { return rows[n].first(d); }, N, weights.data(), 0, probes.padded, Q,
          [](int64_t, int64_t) { return Pair{Vec(0.0f), Vec(0.0f)}; },
          [&](int64_t q, int64_t d, const Pair& mixed) {
            put_row(mixed, static_cast<Scalar*>(args.outs[q]) + t * D, d, D);
          });
    }
  }
}

struct MixBackward {
  Rows sources;         // N rows, then the gradients that there are, in the order of their queries
  const int64_t* row_of_grad;  // Q: which of the rows is the gradient of this mix, or -1
  const float* probes;  // [Q, D]
  const float* rstd;    // [T, N]
  const float* logit;   // [T, N, Q]
  const float* dlse;    // [Q, T], or null
  void* const* dsources;  // N of [T, D]
  float *parts, *dprobes;  // [num_chunks, Q, D]; [Q, D]
  int64_t num_tokens, num_sources, num_queries, width, num_chunks;
  const float* factors;  // Q, of the mixes
};

ATTNRES_KERNEL mix_backward(const MixBackward& args, int num_threads) {
  const int64_t N = args.num_sources, Q = args.num_queries, D = args.width, T = args.num_tokens;
#pragma omp parallel num_threads(num_threads)
  {
    // `terms` is what the gradient of a source is made of: the gradients of the mixes, then the probes
    Tile terms(2 * Q, D), sums(Q, D);
    const int64_t padded = terms.padded;
    std::vector<Row<Scalar>> rows(N);
    const std::vector<const float*> parts = pointers(terms, 2 * Q);
    // of one token: weights [Q, N], their gradients [N, Q], z [Q, N], factors of the terms [N, 2Q] and of the rows [N]
    std::vector<float> weights(Q * N), products(N * Q + 1), z(Q * N), factors(N * 2 * Q), slopes(N);
    for (int64_t q = 0; q < Q; q++) terms.load(Q + q, args.probes + q * D);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < args.num_chunks; chunk++) {
      std::fill(sums.values.begin(), sums.values.end(), 0.0f);
      for (int64_t t = T * chunk / args.num_chunks; t < T * (chunk + 1) / args.num_chunks; t++) {
        for (int64_t q = 0; q < Q; q++)
          if (args.row_of_grad[q] >= 0) terms.load(q, args.sources.row(args.row_of_grad[q], t, T, D));
        // the square of a row, behind its products, is those of the next row's to write over
        for (int64_t n = 0; n < N; n++) {
          rows[n] = args.sources.row(n, t, T, D);
          dots(rows[n], padded, parts.data(), Q, products.data() + n * Q);
        }
        const float *logit = args.logit + t * N * Q, *rstd = args.rstd + t * N;
        softmax(logit, N, Q, weights.data(), nullptr, 0);
        for (int64_t q = 0; q < Q; q++) {
          const float *weight = weights.data() + q * N, factor = args.factors[q];
          // what is taken off each product is about as large as that
          double pull = 0.0, dlse = args.dlse == nullptr ? 0.0f : args.dlse[q * T + t];
          for (int64_t n = 0; n < N; n++) pull += double(weight[n]) * products[n * Q + q];
          for (int64_t n = 0; n < N; n++) {
            double dlogit = weight[n] * (factor * (products[n * Q + q] - pull) + dlse);
            z[q * N + n] = dlogit * rstd[n];
            factors[n * 2 * Q + q] = factor * weight[n];
            factors[n * 2 * Q + Q + q] = z[q * N + n];
          }
        }
        for (int64_t n = 0; n < N; n++) {
          double c = 0.0;
          for (int64_t q = 0; q < Q; q++) c += z[q * N + n] * logit[n * Q + q];
          slopes[n] = -c * rstd[n] / D;
        }
        for (int64_t from = 0; from < padded; from += BLOCK) {
          const int64_t to = std::min(from + BLOCK, padded);
          combine(
              [&](int64_t i, int64_t d) { return pair_at(parts[i] + d); }, 2 * Q, factors.data(), from, to, N,
              [&](int64_t n, int64_t d) { return Vec(slopes[n]) * rows[n].again(d); },
              [&](int64_t n, int64_t d, const Pair& grad) {
                put_row(grad, static_cast<Scalar*>(args.dsources[n]) + t * D, d, D);
              });
          combine(
              [&](int64_t n, int64_t d) { return rows[n].again(d); }, N, z.data(), from, to, Q,
              [&](int64_t q, int64_t d) { return pair_at(sums[q] + d); },
              [&](int64_t q, int64_t d, const Pair& sum) { put(sum, sums[q] + d); });
        }
      }
      for (int64_t q = 0; q < Q; q++) sums.store(q, args.parts + (chunk * Q + q) * D);
    }
    sum_chunks(args.parts, args.num_chunks, Q * D, args.dprobes);
  }
}

enum Norm : int64_t { NONE = 0, RMS = 1, LAYER = 2 };

struct Merge {
  Rows rows;               // partial, inter_out, and the update if there is one
  int64_t update_kind;     // the dtype of the update: 0 float32, 1 bfloat16, 2 float16; -1 without one
  const float *lse, *probe, *weight, *bias;  // [T]; [D]; [D] or null
  void *total, *out;       // [T, D]; total is null without an update
  float* stats;            // [T, 4]: rstd and logit of the sum, rstd and mean of the norm
  int64_t num_tokens, width, norm;
  float eps, norm_eps, factor;
};

// scalars of a token are float64: their rounding would be that of a whole row
double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// a row of the update, whose dtype may be another than that of the rest
struct Update {
  int64_t kind;
  Row<float> row;
  Row<c10::BFloat16> bfloat16_row;
  Row<c10::Half> half_row;

  Update(const Merge& args, int64_t token) : kind(args.update_kind) {
    if (kind == 0) row = args.rows.row<float>(2, token, args.num_tokens, args.width);
    if (kind == 1) bfloat16_row = args.rows.row<c10::BFloat16>(2, token, args.num_tokens, args.width);
    if (kind == 2) half_row = args.rows.row<c10::Half>(2, token, args.num_tokens, args.width);
  }

  Pair first(int64_t d) const {
    return kind == 0 ? row.first(d) : kind == 1 ? bfloat16_row.first(d) : half_row.first(d);
  }
};

ATTNRES_KERNEL merge(const Merge& args, int num_threads) {
  const int64_t D = args.width, T = args.num_tokens;
#pragma omp parallel num_threads(num_threads)
  {
    Tile tile(6, D);
    float *p = tile[0], *mixed = tile[1], *probe = tile[2], *weight = tile[3], *bias = tile[4], *ones = tile[5];
    // of the channels that there are: what is padded stays zero
    std::fill(ones, ones + D, 1.0f);
    std::copy_n(args.weight == nullptr ? ones : args.weight, D, weight);
    if (args.bias != nullptr) std::copy_n(args.bias, D, bias);
    std::copy_n(args.probe, D, probe);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++) {
      const Row<Scalar> partial = args.rows.row(0, t, T, D), inter_out = args.rows.row(1, t, T, D);
      const Update update(args, t);
      Scalar *total = static_cast<Scalar*>(args.total) + t * D, *out = static_cast<Scalar*>(args.out) + t * D;
      float found[2];
      sum_up<2>(tile.padded, found, [&](int64_t d, Pair* sums) {
        Pair here = partial.first(d);
        if (args.update_kind >= 0) {
          const Pair sum = here + update.first(d);
          put_row(sum, total, d, D);
          // the merge takes the sum as later reads will find it
          here = widen<Scalar>(narrow<Scalar>(sum));
        }
        put(here, p + d);
        sums[0] = fmadd(here, here, sums[0]);
        sums[1] = fmadd(here, pair_at(probe + d), sums[1]);
      });
      const double rstd = 1.0 / std::sqrt(double(found[0]) / D + args.eps), logit = found[1] * rstd, lse = args.lse[t];
      // 1 - share would lose a rest that is small
      const Vec share(float(args.factor * sigmoid(logit - lse))), rest(float(args.factor * sigmoid(lse - logit)));
      float norm_rstd = 0.0f, mean = 0.0f, square = 0.0f;
      const auto mix_at = [&](int64_t d) {
        return fmadd(rest, inter_out.first(d), share * pair_at(p + d));
      };
      if (args.norm == NONE) {
        for (int64_t d = 0; d < tile.padded; d += PAIR) put_row(mix_at(d), out, d, D);
      }
      if (args.norm == RMS) {
        sum_up<1>(tile.padded, &square, [&](int64_t d, Pair* sums) {
          const Pair here = mix_at(d);
          put(here, mixed + d);
          sums[0] = fmadd(here, here, sums[0]);
        });
      }
      if (args.norm == LAYER) {
        sum_up<1>(tile.padded, &mean, [&](int64_t d, Pair* sums) {
          const Pair here = mix_at(d);
          put(here, mixed + d);
          sums[0] = sums[0] + here;
        });
        mean /= D;
        sum_up<1>(tile.padded, &square, [&](int64_t d, Pair* sums) {
          const Pair here = pair_at(mixed + d) - Vec(mean) * pair_at(ones + d);
          sums[0] = fmadd(here, here, sums[0]);
        });
      }
      if (args.norm != NONE) {
        norm_rstd = 1.0 / std::sqrt(double(square) / D + args.norm_eps);
        for (int64_t d = 0; d < tile.padded; d += PAIR) {
          const Pair centred = pair_at(mixed + d) - Pair{Vec(mean), Vec(mean)};
          const Pair here = fmadd(Vec(norm_rstd) * centred, pair_at(weight + d), pair_at(bias + d));
          put_row(here, out, d, D);
        }
      }
      float* stats = args.stats + 4 * t;
      stats[0] = rstd, stats[1] = logit, stats[2] = norm_rstd, stats[3] = mean;
    }
  }
}

struct MergeBackward {
  Rows rows;              // the new partial sum, inter_out, their gradient, and that of the new sum if there is one
  int64_t has_grad_total;
  const float *lse, *probe, *weight, *stats;  // weight may be null
  void *dtotal, *dinter;  // [T, D]
  float *dlse, *parts, *dvectors;  // [T]; [num_chunks, 1 + weight + bias, D]; [1 + weight + bias, D]
  int64_t num_tokens, width, norm, has_bias, num_chunks;
  float factor;
};

ATTNRES_KERNEL merge_backward(const MergeBackward& args, int num_threads) {
  const int64_t D = args.width, T = args.num_tokens;
  const int64_t num_vectors = 1 + (args.weight != nullptr) + (args.has_bias != 0);
#pragma omp parallel num_threads(num_threads)
  {
    Tile tile(5, D), sums(3, D);
    float *g = tile[0], *y = tile[1], *probe = tile[2], *weight = tile[3], *ones = tile[4];
    std::fill(ones, ones + D, 1.0f);
    std::copy_n(args.weight == nullptr ? ones : args.weight, D, weight);
    std::copy_n(args.probe, D, probe);
    float *dprobe = sums[0], *dweight = sums[1], *dbias = sums[num_vectors - 1];
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < args.num_chunks; chunk++) {
      std::fill(sums.values.begin(), sums.values.end(), 0.0f);
      for (int64_t t = T * chunk / args.num_chunks; t < T * (chunk + 1) / args.num_chunks; t++) {
        const auto row_of = [&](int64_t tensor) { return args.rows.row(tensor, t, T, D); };
        const Row<Scalar> partial = row_of(0), inter_out = row_of(1), grad_out = row_of(2);
        const Row<Scalar> grad_total = row_of(args.has_grad_total ? 3 : 2);
        const float* stats = args.stats + 4 * t;
        const double rstd = stats[0], logit = stats[1], lse = args.lse[t];
        const Vec norm_rstd(stats[2]), mean(stats[3]);
        const double part = sigmoid(logit - lse), other = sigmoid(lse - logit);
        const Vec share(float(args.factor * part)), rest(float(args.factor * other));
        float product;
        if (args.norm == NONE) {
          sum_up<1>(tile.padded, &product, [&](int64_t d, Pair* sum) {
            const Pair grad = grad_out.first(d);
            put(grad, g + d);
            sum[0] = fmadd(grad, partial.first(d) - inter_out.first(d), sum[0]);
          });
        } else {
          float found[2];
          sum_up<2>(tile.padded, found, [&](int64_t d, Pair* sum) {
            const Pair grad = grad_out.first(d), mixed = rest * inter_out.first(d) + share * partial.first(d);
            const Pair centred = mixed - mean * pair_at(ones + d);
            const Pair here = norm_rstd * centred, weighted = grad * pair_at(weight + d);
            if (args.has_bias) put(pair_at(dbias + d) + grad, dbias + d);
            if (args.weight != nullptr) put(fmadd(grad, here, pair_at(dweight + d)), dweight + d);
            put(here, y + d);
            put(weighted, g + d);
            sum[0] = fmadd(weighted, here, sum[0]);
            sum[1] = sum[1] + weighted;
          });
          const Vec pull(found[0] / D), middle(args.norm == LAYER ? found[1] / D : 0.0f);
          sum_up<1>(tile.padded, &product, [&](int64_t d, Pair* sum) {
            const Pair off = middle * pair_at(ones + d) + pull * pair_at(y + d);
            const Pair grad = norm_rstd * (pair_at(g + d) - off);
            put(grad, g + d);
            sum[0] = fmadd(grad, partial.again(d) - inter_out.again(d), sum[0]);
          });
        }
        const double dlogit = args.factor * part * other * product;
        args.dlse[t] = -dlogit;
        const Vec scaled(float(dlogit * rstd)), bend(float(rstd * logit / D));
        Scalar *dinter = static_cast<Scalar*>(args.dinter) + t * D, *dtotal = static_cast<Scalar*>(args.dtotal) + t * D;
        for (int64_t d = 0; d < tile.padded; d += PAIR) {
          const Pair here = partial.again(d), grad = pair_at(g + d);
          put_row(rest * grad, dinter, d, D);
          put(fmadd(scaled, here, pair_at(dprobe + d)), dprobe + d);
          Pair found = share * grad + scaled * (pair_at(probe + d) - bend * here);
          if (args.has_grad_total) found = found + grad_total.first(d);
          put_row(found, dtotal, d, D);
        }
      }
      for (int64_t k = 0; k < num_vectors; k++) sums.store(k, args.parts + (chunk * num_vectors + k) * D);
    }
    sum_chunks(args.parts, args.num_chunks, num_vectors * D, args.dvectors);
  }
}

}  // namespace

#define ATTNRES_EXPORT(NAME, ARGUMENTS) \
  extern "C" void attnres_##NAME(const ARGUMENTS* args, int num_threads) { NAME(*args, num_threads); }

ATTNRES_EXPORT(mix, Mix)
ATTNRES_EXPORT(mix_backward, MixBackward)
ATTNRES_EXPORT(merge, Merge)
ATTNRES_EXPORT(merge_backward, MergeBackward)
