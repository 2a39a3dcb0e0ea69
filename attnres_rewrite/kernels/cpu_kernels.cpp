// The kernels of all operations for a CPU; cpu_library.py compiles them, once for each Scalar, the dtype of the rows,
// and each cpu.py calls its own.
//
// T tokens, N sources, Q queries, D channels. A token is done whole: its rows are widened once to float32, in rows of P
// floats, P being D rounded up to whole vectors of 16 bits and the rest zero, so no loop has a tail; they stay in the cache. All
// arithmetic is two loops over them, `dots` and `combine`. Gradients that sum over tokens are summed for each of
// num_chunks runs of tokens, whose number does not depend on that of the threads: the same bits in every run.
//
// The formulas are those of the Triton kernels beside each cpu.py.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

using Scalar = ATTNRES_SCALAR;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
// outputs of one loop: so many sums stay in registers
constexpr int GROUP = 4;
// vectors that are added up as they come, before their sum is added to that of all by Kahan's method
constexpr int64_t RUN = 16;

// where the rows of several tensors start; see rows.py
struct Rows {
  const void* const* tensors;
  const int64_t* strides;
  const int64_t* sizes;
  int64_t rank;

  template <typename Kind = Scalar>
  const Kind* row(int64_t tensor, int64_t token) const {
    const int64_t* stride = strides + tensor * rank;
    int64_t start = 0;
    for (int64_t dim = rank - 1; dim > 0; dim--) {
      start += token % sizes[dim - 1] * stride[dim];
      token /= sizes[dim - 1];
    }
    return static_cast<const Kind*>(tensors[tensor]) + start + token * stride[0];
  }
};

// rows of P floats in the cache of one thread
struct Tile {
  int64_t width, padded;
  std::vector<float> values;

  Tile(int64_t rows, int64_t width)
      : width(width), padded((width + 2 * LANES - 1) / (2 * LANES) * (2 * LANES)), values(rows * padded, 0.0f) {}

  float* operator[](int64_t row) { return values.data() + row * padded; }

  template <typename Kind>
  void load(int64_t row, const Kind* from) {
    float* to = (*this)[row];
    for (int64_t d = 0; d < width; d += step<Kind>) {
      const int64_t left = std::min(width - d, step<Kind>);
      const auto here = at::vec::Vectorized<Kind>::loadu(from + d, left);
      if constexpr (std::is_same_v<Kind, float>) {
        here.store(to + d);
      } else {
        const auto [low, high] = at::vec::convert_to_float<Kind>(here);
        low.store(to + d);
        high.store(to + d + LANES);
      }
    }
  }

  template <typename Kind>
  void store(int64_t row, Kind* to) {
    const float* from = (*this)[row];
    for (int64_t d = 0; d < width; d += step<Kind>) {
      const int64_t left = std::min(width - d, step<Kind>);
      if constexpr (std::is_same_v<Kind, float>) {
        Vec::loadu(from + d).store(to + d, left);
      } else {
        const Vec low = Vec::loadu(from + d), high = Vec::loadu(from + d + LANES);
        at::vec::convert_from_float<Kind>(low, high).store(to + d, left);
      }
    }
  }

 private:
  // of 16 bits there are twice as many in a vector
  template <typename Kind>
  static constexpr int64_t step = at::vec::Vectorized<Kind>::size();
};

float total_of(Vec sum) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
}

// out[k] = value . rows[k]
template <int K>
void dots(const float* value, const float* const* rows, int64_t padded, float* out) {
  Vec sums[K], lost[K];
  for (int k = 0; k < K; k++) sums[k] = lost[k] = Vec(0.0f);
  for (int64_t first = 0; first < padded; first += RUN * LANES) {
    // two sums each, so that one need not wait for the other
    Vec even[K], odd[K];
    for (int k = 0; k < K; k++) even[k] = odd[k] = Vec(0.0f);
    for (int64_t d = first; d < std::min(first + RUN * LANES, padded); d += 2 * LANES) {
      const Vec here = Vec::loadu(value + d), next = Vec::loadu(value + d + LANES);
      for (int k = 0; k < K; k++) {
        even[k] = at::vec::fmadd(here, Vec::loadu(rows[k] + d), even[k]);
        odd[k] = at::vec::fmadd(next, Vec::loadu(rows[k] + d + LANES), odd[k]);
      }
    }
    for (int k = 0; k < K; k++) {
      const Vec run = even[k] + odd[k] - lost[k], next = sums[k] + run;
      lost[k] = next - sums[k] - run;
      sums[k] = next;
    }
  }
  for (int k = 0; k < K; k++) out[k] = total_of(sums[k]);
}

void dots(const float* value, const float* const* rows, int64_t count, int64_t padded, float* out) {
  for (; count >= GROUP; count -= GROUP, rows += GROUP, out += GROUP) dots<GROUP>(value, rows, padded, out);
  if (count == 3) dots<3>(value, rows, padded, out);
  if (count == 2) dots<2>(value, rows, padded, out);
  if (count == 1) dots<1>(value, rows, padded, out);
}

// outs[k] (+)= sum over i of factors[k * count + i] * rows[i]
template <int K, bool ADD>
void combine(const float* const* rows, int64_t count, const float* factors, int64_t padded, float* const* outs) {
  for (int64_t d = 0; d < padded; d += LANES) {
    Vec sums[K];
    for (int k = 0; k < K; k++) sums[k] = ADD ? Vec::loadu(outs[k] + d) : Vec(0.0f);
    for (int64_t i = 0; i < count; i++) {
      Vec here = Vec::loadu(rows[i] + d);
      for (int k = 0; k < K; k++) sums[k] = at::vec::fmadd(Vec(factors[k * count + i]), here, sums[k]);
    }
    for (int k = 0; k < K; k++) sums[k].store(outs[k] + d);
  }
}

template <bool ADD = false>
void combine(
    const float* const* rows, int64_t count, const float* factors, int64_t padded, float* const* outs, int64_t num) {
  for (; num >= GROUP; num -= GROUP, outs += GROUP, factors += GROUP * count)
    combine<GROUP, ADD>(rows, count, factors, padded, outs);
  if (num == 3) combine<3, ADD>(rows, count, factors, padded, outs);
  if (num == 2) combine<2, ADD>(rows, count, factors, padded, outs);
  if (num == 1) combine<1, ADD>(rows, count, factors, padded, outs);
}

float dot(const float* one, const float* other, int64_t padded) {
  float found;
  dots<1>(one, &other, padded, &found);
  return found;
}

std::vector<const float*> pointers(Tile& tile, int64_t count) {
  std::vector<const float*> found(count);
  for (int64_t row = 0; row < count; row++) found[row] = tile[row];
  return found;
}

std::vector<float*> targets(Tile& tile, int64_t count) {
  std::vector<float*> found(count);
  for (int64_t row = 0; row < count; row++) found[row] = tile[row];
  return found;
}

// weights [Q, N] of one token from its logits [N, Q]; lse[q * lse_stride], where it is asked for
void softmax(
    const float* logit, int64_t num_sources, int64_t num_queries, float* weights, float* lse, int64_t lse_stride) {
  for (int64_t q = 0; q < num_queries; q++) {
    float* weight = weights + q * num_sources;
    float top = logit[q];
    // the second comparison keeps what is not a number
    for (int64_t n = 1; n < num_sources; n++) {
      float here = logit[n * num_queries + q];
      if (here > top || here != here) top = here;
    }
    for (int64_t n = 0; n < num_sources; n++) weight[n] = logit[n * num_queries + q] - top;
    at::vec::map<float>([](Vec x) { return x.exp(); }, weight, weight, num_sources);
    double total = 0.0;
    for (int64_t n = 0; n < num_sources; n++) total += weight[n];
    for (int64_t n = 0; n < num_sources; n++) weight[n] /= total;
    if (lse != nullptr) lse[q * lse_stride] = top + float(std::log(total));
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

void mix(const Mix& args, int num_threads) {
  const int64_t N = args.num_sources, Q = args.num_queries, D = args.width;
#pragma omp parallel num_threads(num_threads)
  {
    Tile values(N, D), probes(args.probes == nullptr ? 0 : Q, D), outs(args.outs == nullptr ? 0 : Q, D);
    std::vector<float> weights(Q * N), found(Q + 1);
    std::vector<const float*> rows = pointers(values, N), against(Q + 1);
    std::vector<float*> mixes = args.outs == nullptr ? std::vector<float*>() : targets(outs, Q);
    for (int64_t q = 0; args.probes != nullptr && q < Q; q++) {
      probes.load(q, args.probes + q * D);
      against[q + 1] = probes[q];
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < args.num_tokens; t++) {
      for (int64_t n = 0; n < N; n++) values.load(n, args.sources.row(n, t));
      float* logit = args.logit + t * N * Q;
      for (int64_t n = 0; args.probes != nullptr && n < N; n++) {
        against[0] = values[n];
        dots(values[n], against.data(), Q + 1, values.padded, found.data());
        const double rstd = 1.0 / std::sqrt(double(found[0]) / D + args.eps);
        args.rstd[t * N + n] = rstd;
        for (int64_t q = 0; q < Q; q++) logit[n * Q + q] = found[q + 1] * rstd;
      }
      if (args.outs == nullptr) continue;
      softmax(logit, N, Q, weights.data(), args.lse == nullptr ? nullptr : args.lse + t, args.num_tokens);
      for (int64_t q = 0; q < Q; q++)
        for (int64_t n = 0; n < N; n++) weights[q * N + n] *= args.factors[q];
      combine(rows.data(), N, weights.data(), values.padded, mixes.data(), Q);
      for (int64_t q = 0; q < Q; q++) outs.store(q, static_cast<Scalar*>(args.outs[q]) + t * D);
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
  float* dprobes;       // [num_chunks, Q, D]
  int64_t num_tokens, num_sources, num_queries, width, num_chunks;
  const float* factors;  // Q, of the mixes
};

void mix_backward(const MixBackward& args, int num_threads) {
  const int64_t N = args.num_sources, Q = args.num_queries, D = args.width, T = args.num_tokens;
#pragma omp parallel num_threads(num_threads)
  {
    // the gradients first: `terms` is what the gradient of a source is made of
    Tile values(N, D), terms(2 * Q, D), sums(Q, D), dvalues(N, D);
    std::vector<const float*> rows = pointers(values, N), parts = pointers(terms, 2 * Q);
    std::vector<float*> dprobes = targets(sums, Q), gradients = targets(dvalues, N);
    // of one token: weights and their gradients [Q, N], z [Q, N], and the factors of the terms [N, 2Q]
    std::vector<float> weights(Q * N), products(N * Q), z(Q * N), factors(N * 2 * Q);
    for (int64_t q = 0; q < Q; q++) terms.load(Q + q, args.probes + q * D);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < args.num_chunks; chunk++) {
      std::fill(sums.values.begin(), sums.values.end(), 0.0f);
      for (int64_t t = T * chunk / args.num_chunks; t < T * (chunk + 1) / args.num_chunks; t++) {
        for (int64_t n = 0; n < N; n++) values.load(n, args.sources.row(n, t));
        for (int64_t q = 0; q < Q; q++)
          if (args.row_of_grad[q] >= 0) terms.load(q, args.sources.row(args.row_of_grad[q], t));
        const float *logit = args.logit + t * N * Q, *rstd = args.rstd + t * N;
        softmax(logit, N, Q, weights.data(), nullptr, 0);
        for (int64_t n = 0; n < N; n++) dots(values[n], parts.data(), Q, values.padded, products.data() + n * Q);
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
        combine(parts.data(), 2 * Q, factors.data(), values.padded, gradients.data(), N);
        combine<true>(rows.data(), N, z.data(), values.padded, dprobes.data(), Q);
        for (int64_t n = 0; n < N; n++) {
          double c = 0.0;
          for (int64_t q = 0; q < Q; q++) c += z[q * N + n] * logit[n * Q + q];
          const float* value = values[n];
          const Vec slope(float(-c * rstd[n] / D));
          for (int64_t d = 0; d < values.padded; d += LANES)
            at::vec::fmadd(slope, Vec::loadu(value + d), Vec::loadu(gradients[n] + d)).store(gradients[n] + d);
          dvalues.store(n, static_cast<Scalar*>(args.dsources[n]) + t * D);
        }
      }
      for (int64_t q = 0; q < Q; q++) sums.store(q, args.dprobes + (chunk * Q + q) * D);
    }
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

void load_as(Tile& tile, int64_t row, const Rows& rows, int64_t tensor, int64_t token, int64_t kind) {
  if (kind == 0) tile.load(row, rows.row<float>(tensor, token));
  if (kind == 1) tile.load(row, rows.row<c10::BFloat16>(tensor, token));
  if (kind == 2) tile.load(row, rows.row<c10::Half>(tensor, token));
}

void merge(const Merge& args, int num_threads) {
  const int64_t D = args.width;
#pragma omp parallel num_threads(num_threads)
  {
    Tile tile(8, D);
    float *p = tile[0], *o = tile[1], *u = tile[2], *mixed = tile[3], *probe = tile[4], *weight = tile[5];
    float *bias = tile[6], *ones = tile[7];
    std::fill(ones, ones + D, 1.0f);
    tile.load(4, args.probe);
    if (args.weight != nullptr) tile.load(5, args.weight);
    if (args.bias != nullptr) tile.load(6, args.bias);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < args.num_tokens; t++) {
      tile.load(0, args.rows.row(0, t));
      tile.load(1, args.rows.row(1, t));
      if (args.update_kind >= 0) {
        load_as(tile, 2, args.rows, 2, t, args.update_kind);
        for (int64_t d = 0; d < tile.padded; d += LANES) (Vec::loadu(p + d) + Vec::loadu(u + d)).store(p + d);
        // the merge takes the sum as later reads will find it
        Scalar* total = static_cast<Scalar*>(args.total) + t * D;
        tile.store(0, total);
        tile.load(0, total);
      }
      const float* against[] = {p, probe};
      float found[2];
      dots(p, against, 2, tile.padded, found);
      const double rstd = 1.0 / std::sqrt(double(found[0]) / D + args.eps), logit = found[1] * rstd, lse = args.lse[t];
      // 1 - share would lose a rest that is small
      const Vec share(float(args.factor * sigmoid(logit - lse))), rest(float(args.factor * sigmoid(lse - logit)));
      for (int64_t d = 0; d < tile.padded; d += LANES)
        (rest * Vec::loadu(o + d) + share * Vec::loadu(p + d)).store(mixed + d);
      float norm_rstd = 0.0f, mean = 0.0f;
      if (args.norm == LAYER) {
        mean = dot(mixed, ones, tile.padded) / D;
        const Vec middle(mean);
        for (int64_t d = 0; d < tile.padded; d += LANES)
          (Vec::loadu(mixed + d) - middle * Vec::loadu(ones + d)).store(mixed + d);
      }
      if (args.norm != NONE) {
        norm_rstd = 1.0 / std::sqrt(double(dot(mixed, mixed, tile.padded)) / D + args.norm_eps);
        for (int64_t d = 0; d < tile.padded; d += LANES) {
          Vec here = Vec::loadu(mixed + d) * Vec(norm_rstd);
          if (args.weight != nullptr) here = here * Vec::loadu(weight + d);
          if (args.bias != nullptr) here = here + Vec::loadu(bias + d);
          here.store(mixed + d);
        }
      }
      tile.store(3, static_cast<Scalar*>(args.out) + t * D);
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
  float *dlse, *dvectors;  // [T]; [num_chunks, 1 + weight + bias, D]
  int64_t num_tokens, width, norm, has_bias, num_chunks;
  float factor;
};

void merge_backward(const MergeBackward& args, int num_threads) {
  const int64_t D = args.width, T = args.num_tokens;
  const int64_t num_vectors = 1 + (args.weight != nullptr) + (args.has_bias != 0);
#pragma omp parallel num_threads(num_threads)
  {
    Tile tile(11, D), sums(3, D);
    float *p = tile[0], *o = tile[1], *g = tile[2], *y = tile[3], *probe = tile[4], *weight = tile[5];
    float *dinter = tile[6], *dtotal = tile[7], *grad_total = tile[8], *between = tile[9], *ones = tile[10];
    std::fill(ones, ones + D, 1.0f);
    float *dprobe = sums[0], *dweight = sums[1], *dbias = sums[num_vectors - 1];
    tile.load(4, args.probe);
    if (args.weight != nullptr) tile.load(5, args.weight);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < args.num_chunks; chunk++) {
      std::fill(sums.values.begin(), sums.values.end(), 0.0f);
      for (int64_t t = T * chunk / args.num_chunks; t < T * (chunk + 1) / args.num_chunks; t++) {
        tile.load(0, args.rows.row(0, t));
        tile.load(1, args.rows.row(1, t));
        tile.load(2, args.rows.row(2, t));
        if (args.has_grad_total) tile.load(8, args.rows.row(3, t));
        const float* stats = args.stats + 4 * t;
        const double rstd = stats[0], logit = stats[1], lse = args.lse[t];
        const float norm_rstd = stats[2], mean = stats[3];
        const double part = sigmoid(logit - lse), other = sigmoid(lse - logit);
        const Vec share(float(args.factor * part)), rest(float(args.factor * other));
        for (int64_t d = 0; d < tile.padded; d += LANES)
          (Vec::loadu(p + d) - Vec::loadu(o + d)).store(between + d);
        if (args.norm != NONE) {
          for (int64_t d = 0; d < tile.padded; d += LANES) {
            const Vec centred = rest * Vec::loadu(o + d) + share * Vec::loadu(p + d) - Vec(mean) * Vec::loadu(ones + d);
            const Vec grad = Vec::loadu(g + d), here = centred * Vec(norm_rstd);
            here.store(y + d);
            if (args.has_bias) (Vec::loadu(dbias + d) + grad).store(dbias + d);
            if (args.weight == nullptr) continue;
            at::vec::fmadd(grad, here, Vec::loadu(dweight + d)).store(dweight + d);
            (grad * Vec::loadu(weight + d)).store(g + d);
          }
          const float* against[] = {y, ones};
          float found[2];
          dots(g, against, 2, tile.padded, found);
          const Vec pull(found[0] / D), middle(args.norm == LAYER ? found[1] / D : 0.0f), scale(norm_rstd);
          for (int64_t d = 0; d < tile.padded; d += LANES) {
            const Vec off = middle * Vec::loadu(ones + d) + pull * Vec::loadu(y + d);
            ((Vec::loadu(g + d) - off) * scale).store(g + d);
          }
        }
        const double dlogit = args.factor * part * other * dot(g, between, tile.padded);
        args.dlse[t] = -dlogit;
        const Vec scaled(float(dlogit * rstd)), bend(float(rstd * logit / D));
        for (int64_t d = 0; d < tile.padded; d += LANES) {
          Vec here = Vec::loadu(p + d), grad = Vec::loadu(g + d);
          (rest * grad).store(dinter + d);
          at::vec::fmadd(scaled, here, Vec::loadu(dprobe + d)).store(dprobe + d);
          Vec found = share * grad + scaled * (Vec::loadu(probe + d) - here * bend);
          if (args.has_grad_total) found = found + Vec::loadu(grad_total + d);
          found.store(dtotal + d);
        }
        tile.store(6, static_cast<Scalar*>(args.dinter) + t * D);
        tile.store(7, static_cast<Scalar*>(args.dtotal) + t * D);
      }
      for (int64_t k = 0; k < num_vectors; k++) sums.store(k, args.dvectors + (chunk * num_vectors + k) * D);
    }
  }
}

#define ATTNRES_EXPORT(NAME, ARGUMENTS) \
  extern "C" void attnres_##NAME(const ARGUMENTS* args, int num_threads) { NAME(*args, num_threads); }

ATTNRES_EXPORT(mix, Mix)
ATTNRES_EXPORT(mix_backward, MixBackward)
ATTNRES_EXPORT(merge, Merge)
ATTNRES_EXPORT(merge_backward, MergeBackward)
