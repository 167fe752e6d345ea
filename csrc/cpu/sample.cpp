// Sampling fused with the LM head: each chunk of logits is reduced to one Partial per row as soon as it is computed.
// Neither the number of threads nor the other rows change a bit of a row's results.
#include "../checks.h"
#include "product.h"
#include "vector_math.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace toolx {

namespace {

constexpr float kOfNothing = -1e4f;  // its exp() is zero, and unlike -inf, it times zero is not NaN
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Partial {
  double total, moment;  // sums of exp(z - top) and exp(z - top) * (z - top)
  int64_t token;         // of the largest score
  float top, score, logit;
};

struct Sweep : Product {
  const float* bias;       // (V) or null
  const int64_t* streams;  // (R, 5), or null for no noise
  float* logits;           // (R, V) or null
  Partial* partials;       // (chunks, R)
  float scale, softcap;
};

// Turns z[0, n) into logits in place, sets z[n, padded) to -inf, and computes their sums.
template <int L>
TOOLX_INLINE void summarise(const Sweep& s, int64_t first, int64_t n, int64_t padded, float* z, Partial& out) {
  if (s.bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      z[i] += s.bias[first + i];
    }
  }
  if (s.softcap > 0) {
    const float cap = s.softcap;
    for (int64_t i = 0; i < n; ++i) {
      z[i] = capped(z[i], cap);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    z[i] *= s.scale;
  }
  std::fill(z + n, z + padded, -kInfinity);
  Vector<L> tops = Vector<L>{} + std::numeric_limits<float>::lowest(), totals = {}, moments = {};
  for (int64_t i = 0; i < padded; i += L) {
    const Vector<L> x = vector_at<L>(z + i);
    tops = x > tops ? x : tops;
  }
  float top = tops[0];
  for (int lane = 1; lane < L; ++lane) {
    top = std::max(top, tops[lane]);
  }
  float distances[kChunk], exps[kChunk];
  for (int64_t i = 0; i < padded; ++i) {
    const float d = z[i] - top;
    distances[i] = select(d < kOfNothing, kOfNothing, d);
    exps[i] = exp_of(distances[i]);
  }
  for (int64_t i = 0; i < padded; i += L) {
    totals += vector_at<L>(exps + i);
    moments += vector_at<L>(exps + i) * vector_at<L>(distances + i);
  }
  out.top = top;
  out.total = out.moment = 0.0;
  for (int lane = 0; lane < L; ++lane) {
    out.total += totals[lane];
    out.moment += moments[lane];
  }
}

// noise[0, n) of the tokens from `first` on; n and `first` are multiples of 4.
TOOLX_INLINE void noise_of(const int64_t* stream, int64_t first, int64_t n, float* noise) {
  uint32_t words[kChunk], key[5];
  for (int i = 0; i < 5; ++i) {
    key[i] = static_cast<uint32_t>(stream[i]);
  }
  philox(static_cast<uint32_t>(first / 4), key[4], key[2], key[3], key[0], key[1], n / 4, words);
  for (int64_t i = 0; i < n; ++i) {
    noise[i] = gumbel_of(words[i]);
  }
}

// The largest z + noise (z alone without a stream) and its token: the lowest of equal ones, and a valid id even if all
// z are NaN.
template <int L>
TOOLX_INLINE void choose(const int64_t* stream, int64_t first, int64_t padded, const float* z, Partial& out) {
  Vector<L> best = Vector<L>{} - kInfinity;
  typename Of<L>::Integers at = {}, here;
  float noise[kChunk];
  if (stream != nullptr) {
    noise_of(stream, first, padded, noise);
  }
  for (int lane = 0; lane < L; ++lane) {
    here[lane] = lane;
  }
  for (int64_t i = 0; i < padded; i += L) {
    Vector<L> x = vector_at<L>(z + i);
    if (stream != nullptr) {
      x += vector_at<L>(noise + i);
    }
    at = x > best ? here : at;
    best = x > best ? x : best;
    here += L;
  }
  int winner = 0;
  for (int lane = 1; lane < L; ++lane) {
    const bool better = best[lane] > best[winner] || (best[lane] == best[winner] && at[lane] < at[winner]);
    winner = better ? lane : winner;
  }
  out.score = best[winner];
  out.logit = z[at[winner]];
  out.token = first + at[winner];
}

template <int L>
TOOLX_INLINE void sweep(const Sweep& s, int64_t begin, int64_t end) {
  const int64_t blocks = (s.rows + kRows - 1) / kRows;
  Space space(kStrip * s.width + std::min(s.rows, kRows) * kChunk);
  float* const strip = space.begin();
  float* const z = strip + kStrip * s.width;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kChunk;
    const int64_t n = std::min(kChunk, s.vocab - first);
    const int64_t padded = (n + kStrip - 1) / kStrip * kStrip;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = s.rows * block / blocks;
      const int64_t rows = s.rows * (block + 1) / blocks - row;
      multiply<L>(s, first, row, rows, strip, z);
      for (int64_t r = 0; r < rows; ++r) {
        float* const of_row = z + r * kChunk;
        Partial& out = s.partials[chunk * s.rows + row + r];
        summarise<L>(s, first, n, padded, of_row, out);
        choose<L>(s.streams == nullptr ? nullptr : s.streams + (row + r) * 5, first, padded, of_row, out);
        if (s.logits != nullptr) {
          std::memcpy(s.logits + (row + r) * s.vocab + first, of_row, n * sizeof(float));
        }
      }
    }
  }
}

TOOLX_INLINE void add_noise(const int64_t* stream, int64_t first, int64_t n, float* z) {
  float noise[kChunk];
  noise_of(stream, first, (n + 3) / 4 * 4, noise);
  for (int64_t i = 0; i < n; ++i) {
    z[i] += noise[i];
  }
}

// Joins the chunks in order: writes the row's token, and its log-prob, lse and entropy to stats (3, R).
void join(const Sweep& s, int64_t chunks, int64_t row, int64_t* token, float* stats) {
  Partial whole = s.partials[row];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const Partial& part = s.partials[chunk * s.rows + row];
    const float top = std::max(whole.top, part.top);
    const auto rescale = [top](const Partial& p, double& total, double& moment) {
      const double shift = std::max<double>(p.top - top, kOfNothing);
      const double factor = std::exp(shift);
      total += factor * p.total;
      moment += factor * (p.moment + shift * p.total);
    };
    double total = 0.0, moment = 0.0;
    rescale(whole, total, moment);
    rescale(part, total, moment);
    whole.top = top;
    whole.total = total;
    whole.moment = moment;
    if (part.score > whole.score) {
      whole.score = part.score;
      whole.logit = part.logit;
      whole.token = part.token;
    }
  }
  const double log_total = std::log(whole.total);
  *token = whole.token;
  stats[0] = static_cast<float>(static_cast<double>(whole.logit) - whole.top - log_total);
  stats[s.rows] = static_cast<float>(whole.top + log_total);
  stats[2 * s.rows] = static_cast<float>(log_total - whole.moment / whole.total);
}

}  // namespace

// One pass over the weight for all rows: see sample_sweep in toolx_kernels/ops/lm_head/sampling_torch.py. hidden (R, D)
// and bias (V) fp32; weight (V, D) fp32, bf16 or fp16; streams (R, 5) and tokens (R) int64; stats (3, R) and logits
// (R, V) fp32, written.
void sample_sweep_cpu(
    Tensor hidden, Tensor weight, std::optional<Tensor> streams, double temperature, std::optional<Tensor> bias,
    double softcap, Tensor tokens, Tensor stats, std::optional<Tensor> logits) {
  require(
      hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0,
      "sample_sweep: hidden must be (R, D) and weight (V, D), with V > 0.");
  const int64_t rows = hidden.size(0), vocab = weight.size(0), dim = hidden.size(1);
  require(
      tokens.dim() == 1 && tokens.size(0) == rows && stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == rows,
      "sample_sweep: tokens must be (R) and stats (3, R).");
  require(
      !streams || (streams->dim() == 2 && streams->size(0) == rows && streams->size(1) == 5 &&
                   streams->scalar_type() == ScalarType::Long && streams->is_contiguous()),
      "sample_sweep: streams must be (R, 5), int64 and contiguous.");
  require(
      !bias || (bias->dim() == 1 && bias->size(0) == vocab && bias->scalar_type() == ScalarType::Float),
      "sample_sweep: bias must be (V) and fp32.");
  require(
      !logits || (logits->dim() == 2 && logits->size(0) == rows && logits->size(1) == vocab &&
                  logits->scalar_type() == ScalarType::Float),
      "sample_sweep: logits must be (R, V) and fp32.");
  const ScalarType type = weight.scalar_type();
  require(
      hidden.scalar_type() == ScalarType::Float && stats.scalar_type() == ScalarType::Float &&
          (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
      "sample_sweep: hidden and stats must be fp32, weight fp32, bf16 or fp16.");
  require(tokens.scalar_type() == ScalarType::Long, "sample_sweep: tokens must be int64.");
  require(
      hidden.is_contiguous() && tokens.is_contiguous() && stats.is_contiguous() &&
          (!bias || bias->is_contiguous()) && (!logits || logits->is_contiguous()) &&
          (dim <= 1 || weight.stride(1) == 1),
      "sample_sweep: every tensor must be contiguous, weight at least within its rows.");
  if (rows == 0) {
    return;
  }
  const int64_t parts = std::max<int64_t>(1, (dim + kDepth - 1) / kDepth);
  const int64_t width = ((dim + parts - 1) / parts + kMostLanes - 1) / kMostLanes * kMostLanes;
  Space packed(parts * rows * width);
  const float* const from = hidden.const_data_ptr<float>();
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t n = std::min(width, dim - part * width);
      std::copy_n(from + row * dim + part * width, n, packed.begin() + (part * rows + row) * width);
    }
  }
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  std::vector<Partial> partials(chunks * rows);
  const Sweep s{
      {packed.begin(), weight.const_data_ptr(), type, rows, vocab, dim, weight.stride(0), parts, width},
      bias ? bias->const_data_ptr<float>() : nullptr,
      streams ? streams->const_data_ptr<int64_t>() : nullptr,
      logits ? logits->mutable_data_ptr<float>() : nullptr,
      partials.data(),
      static_cast<float>(1.0 / temperature),
      static_cast<float>(softcap)};
  const int best = best_lanes();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for_lanes(best, [&](auto lanes) TOOLX_INLINE_LAMBDA { sweep<lanes>(s, begin, end); });
  });
  for (int64_t row = 0; row < rows; ++row) {
    join(s, chunks, row, tokens.mutable_data_ptr<int64_t>() + row, stats.mutable_data_ptr<float>() + row);
  }
}

// Adds the noise of streams (R, 5) int64 to logits (R, V) fp32.
void add_gumbel_cpu(Tensor logits, Tensor streams) {
  require(
      logits.dim() == 2 && streams.dim() == 2 && streams.size(0) == logits.size(0) && streams.size(1) == 5 &&
          logits.scalar_type() == ScalarType::Float && streams.scalar_type() == ScalarType::Long &&
          logits.is_contiguous() && streams.is_contiguous(),
      "add_gumbel: logits must be (R, V) fp32 and streams (R, 5) int64, both contiguous.");
  const int64_t vocab = logits.size(1);
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  float* const z = logits.mutable_data_ptr<float>();
  const int64_t* const from = streams.const_data_ptr<int64_t>();
  const int best = best_lanes();
  torch::stable::parallel_for(0, logits.size(0) * chunks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / chunks;
      const int64_t first = unit % chunks * kChunk;
      const int64_t n = std::min(kChunk, vocab - first);
      for_lanes(best, [&](auto) TOOLX_INLINE_LAMBDA { add_noise(from + row * 5, first, n, z + row * vocab + first); });
    }
  });
}

}  // namespace toolx
