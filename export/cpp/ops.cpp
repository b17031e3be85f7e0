// The ops inferix::* for torch in C++, each with a form for the CPU in plain torch, so that AOTInductor packages that
// keep our ops load in a process without Python. Schemas are those of kernels/, and forms are the references there
// (kernels/<op>/reference.py), which the tests compare. The collectives have no form: they need the ranks of an engine.
//
// A process that imports inferix in Python has these ops already and must not load this library too.
#define AT_PER_OPERATOR_HEADERS  // only the headers of the functions used, not of all
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

#include <cmath>

#include "noise.hpp"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr at::ScalarType fp8 = at::kFloat8_e4m3fn;
constexpr int64_t last[] = {-1};  // the last dim

// The dtype that an op computes in for tensors of a dtype: float32 or better.
at::ScalarType wide_of(const Tensor& x) { return c10::promoteTypes(x.scalar_type(), at::kFloat); }

// Largest entry of a tensor that has scales beside it.
double limit_of(at::ScalarType dtype) { return dtype == fp8 ? 448 : 127; }

// A store whose dtype torch cannot index (FP8) as bytes.
Tensor indexable(const Tensor& store) { return store.scalar_type() == fp8 ? store.view(at::kByte) : store; }

// Pages [2, n, ...] of a store, and their write.
Tensor listed_pages(const Tensor& store, const Tensor& pages) {
    return indexable(store).index_select(1, pages).view(store.scalar_type());
}

void write_listed(const Tensor& store, const Tensor& pages, const Tensor& content) {
    indexable(store).index_copy_(1, pages, indexable(content.to(store.scalar_type())));
}

// Scales [2, n, heads] beside pages [2, n, tokens, heads, channels].
Tensor beside_pages(const Tensor& scale) { return scale.unsqueeze(2).unsqueeze(-1); }

// Attention

struct Heads {
    int64_t first, count;
};

// Scores [h, T, K] and values [h, K, D] of one row's heads; q, q_sink: [T, H, D].
std::pair<Tensor, Tensor> scores_and_values(const Tensor& q, const Tensor& kv, const Tensor& pages,
                                            const Maybe& q_sink, int64_t sinks, const Maybe& kv_scale, double scale,
                                            Heads heads) {
    const at::ScalarType wide = wide_of(q);
    const Tensor listed = pages.to(at::kLong);
    Tensor both = listed_pages(kv, listed).to(wide);
    if (kv_scale) both = both * beside_pages(kv_scale->index_select(1, listed).to(wide));
    both = both.flatten(1, 2).repeat_interleave(q.size(1) / kv.size(3), 2).narrow(2, heads.first, heads.count);
    const Tensor k = both.select(0, 0).transpose(0, 1), v = both.select(0, 1).transpose(0, 1);
    auto of = [&](const Tensor& queries, const Tensor& keys) {
        const Tensor chosen = queries.narrow(1, heads.first, heads.count).to(wide).transpose(0, 1);
        return chosen.matmul(keys.transpose(1, 2)) * scale;
    };
    Tensor scores = of(q, k);
    if (q_sink) {
        const int64_t early = std::min(sinks * kv.size(2), k.size(1));
        scores.narrow(2, 0, early).copy_(of(*q_sink, k.narrow(1, 0, early)));
    }
    return {scores, v};
}

Maybe row_of(const Maybe& tensor, int64_t row) { return tensor ? Maybe(tensor->select(0, row)) : std::nullopt; }

void block_attention(const Tensor& q, const Tensor& kv, const Tensor& page_table, const Tensor& page_count,
                     const Tensor& out, const Maybe& q_sink, const Maybe& sink_count, const Maybe& kv_scale,
                     const Maybe& lse, double scale) {
    const int64_t rows = q.size(0), lists = page_table.dim() == 3 ? page_table.size(1) : 1, each = q.size(2) / lists;
    const Tensor table = page_table.reshape({rows, lists, -1}), counts = page_count.reshape({rows, lists});
    const Maybe sinks = sink_count ? Maybe(sink_count->reshape({rows, lists})) : std::nullopt;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t part = 0; part < lists; ++part) {
            const int64_t early = sinks ? (*sinks)[row][part].item<int64_t>() : 0;
            const Tensor pages = table[row][part].narrow(0, 0, counts[row][part].item<int64_t>());
            auto [scores, v] = scores_and_values(q[row], kv, pages, row_of(q_sink, row), early, kv_scale, scale,
                                                 {part * each, each});
            out[row].narrow(1, part * each, each).copy_(scores.softmax(-1).matmul(v).transpose(0, 1));
            if (lse) (*lse)[row].narrow(0, part * each, each).copy_(scores.logsumexp(-1));
        }
}

void attention_parts(const Tensor& q, const Tensor& kv, const Tensor& page_table, const Tensor& page_count,
                     const Tensor& out, const Tensor& lse, const Maybe& q_sink, const Maybe& sink_count,
                     const Maybe& kv_scale, double scale) {
    constexpr int64_t step = 128;  // keys are cut into parts at whole steps
    const int64_t parts = out.size(0);
    for (int64_t row = 0; row < q.size(0); ++row) {
        const int64_t early = sink_count ? (*sink_count)[row].item<int64_t>() : 0;
        const Tensor pages = page_table[row].narrow(0, 0, page_count[row].item<int64_t>());
        auto [scores, v] = scores_and_values(q[row], kv, pages, row_of(q_sink, row), early, kv_scale, scale,
                                             {0, q.size(2)});
        const int64_t keys = v.size(1), steps = (keys + step - 1) / step;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = std::min(part * steps / parts * step, keys);
            const int64_t count = std::min((part + 1) * steps / parts * step, keys) - first;
            const Tensor seen = scores.narrow(2, first, count);
            out[part][row].copy_(seen.softmax(-1).matmul(v.narrow(1, first, count)).transpose(0, 1));
            if (count > 0) lse[part][row].copy_(seen.logsumexp(-1));
            else lse[part][row].fill_(-INFINITY);
        }
    }
}

void merge_parts(const Tensor& results, const Tensor& sums, const Tensor& out, const Maybe& lse) {
    out.copy_((results * sums.softmax(0).transpose(2, 3).unsqueeze(-1)).sum(0));
    if (lse) lse->copy_(sums.logsumexp(0));
}

void dense_attention(const Tensor& q, const Tensor& kv, int64_t first, int64_t count, const Tensor& out,
                     double scale) {
    const Tensor pages = at::arange(first, first + count, at::kLong);
    for (int64_t row = 0; row < q.size(0); ++row) {
        auto [scores, v] = scores_and_values(q[row], kv, pages, {}, 0, {}, scale, {0, q.size(2)});
        out[row].copy_(scores.softmax(-1).matmul(v).transpose(0, 1));
    }
}

// Rotation of queries and keys, and the write into pages

// Cosines and sines [R, F*H*W, D/2, 2] of all tokens from each axis: [R, F, a, 2], [H, b, 2], [W, c, 2].
Tensor token_cos_sin(const Tensor& time, const Tensor& row, const Tensor& column) {
    const std::vector<int64_t> grid{time.size(0), time.size(1), row.size(0), column.size(0), -1, 2};
    const Tensor frames = time.unsqueeze(2).unsqueeze(3).expand(grid), rows = row.unsqueeze(1).expand(grid);
    return at::cat({frames, rows, column.expand(grid)}, -2).flatten(1, 3);
}

// x [R, T, n, D] with its first 2 * P channels rotated by cosines and sines [R, T, P, 2].
Tensor rotated(const Tensor& x, const Tensor& cos_sin, bool half_split = false) {
    const int64_t width = 2 * cos_sin.size(-2);
    if (const int64_t rest = x.size(-1) - width; rest > 0)
        return at::cat({rotated(x.narrow(-1, 0, width), cos_sin, half_split), x.narrow(-1, width, rest)}, -1);
    const Tensor cos = cos_sin.unsqueeze(2).select(-1, 0), sin = cos_sin.unsqueeze(2).select(-1, 1);
    const Tensor pairs = half_split ? x.unflatten(-1, {2, -1}).transpose(-1, -2) : x.unflatten(-1, {-1, 2});
    const Tensor one = pairs.select(-1, 0), other = pairs.select(-1, 1);
    const Tensor first = one * cos - other * sin, second = one * sin + other * cos;
    return half_split ? at::cat({first, second}, -1) : at::stack({first, second}, -1).flatten(-2);
}

// Keys and values [R, F*P, n, D] into the pages [R, F] of their frames.
void write_pages(const Tensor& keys, const Tensor& values, const Tensor& kv, const Tensor& pages,
                 const Maybe& kv_scale) {
    const Tensor listed = pages.flatten().to(at::kLong);
    const std::vector<int64_t> shape{listed.size(0), kv.size(2), kv.size(3), kv.size(4)};
    Tensor both = at::stack({keys.reshape(shape), values.reshape(shape)});
    if (kv_scale) {
        const Tensor scale = kv_scale->index_select(1, listed).to(both.scalar_type());
        both = (both / beside_pages(scale)).clamp(-limit_of(fp8), limit_of(fp8));
    }
    write_listed(kv, listed, both);
}

void qk_norm_rope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, const Tensor& rope_time,
                         const Tensor& rope_rows, const Tensor& rope_columns, const Tensor& q, const Tensor& kv,
                         const Tensor& pages, const Maybe& rope_sink, const Maybe& q_sink, const Maybe& kv_scale,
                         double eps) {
    const at::ScalarType wide = wide_of(qkv);
    const int64_t dim = q.size(3), of_q = q.size(2) * dim, of_kv = kv.size(3) * dim;
    const std::vector<Tensor> parts = qkv.to(wide).split_with_sizes({of_q, of_kv, of_kv}, -1);
    auto normed = [&](const Tensor& part, const Tensor& weight) {
        return (part * at::rsqrt(part.square().mean(last, true) + eps) * weight.to(wide)).unflatten(-1, {-1, dim});
    };
    const Tensor queries = normed(parts[0], q_weight), keys = normed(parts[1], k_weight);
    const Tensor cos_sin = token_cos_sin(rope_time, rope_rows, rope_columns).to(wide);
    q.copy_(rotated(queries, cos_sin));
    if (q_sink && rope_sink)
        q_sink->copy_(rotated(queries, token_cos_sin(*rope_sink, rope_rows, rope_columns).to(wide)));
    write_pages(rotated(keys, cos_sin), parts[2].unflatten(-1, {-1, dim}), kv, pages, kv_scale);
}

void rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rope_time, const Tensor& rope_rows,
                 const Tensor& rope_columns, const Tensor& out, const Tensor& kv, const Tensor& pages,
                 const Maybe& rope_sink, const Maybe& q_sink, const Maybe& kv_scale, bool half_split) {
    const at::ScalarType wide = c10::promoteTypes(wide_of(q), rope_time.scalar_type());
    const Tensor cos_sin = token_cos_sin(rope_time, rope_rows, rope_columns).to(wide);
    out.copy_(rotated(q.to(wide), cos_sin, half_split));
    if (rope_sink && q_sink) {
        const Tensor sink = token_cos_sin(*rope_sink, rope_rows, rope_columns).to(wide);
        q_sink->copy_(rotated(q.to(wide), sink, half_split));
    }
    write_pages(rotated(k.to(wide), cos_sin, half_split), v.to(wide), kv, pages, kv_scale);
}

void kv_pages(const Tensor& source, const Tensor& source_pages, const Tensor& target, const Tensor& target_pages,
              const Maybe& source_scale, const Maybe& target_scale) {
    const at::ScalarType from = source.scalar_type(), to = target.scalar_type();
    const at::ScalarType wide = from == at::kDouble || to == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor from_pages = source_pages.to(at::kLong), to_pages = target_pages.to(at::kLong);
    Tensor pages = listed_pages(source, from_pages);
    if (from == to) {
        write_listed(target, to_pages, pages);
        if (source_scale && target_scale)
            target_scale->index_copy_(1, to_pages, source_scale->index_select(1, from_pages));
        return;
    }
    pages = pages.to(wide);
    if (source_scale) pages = pages * beside_pages(source_scale->index_select(1, from_pages).to(wide));
    if (target_scale) {
        const double limit = limit_of(to);
        const Tensor scale = pages.abs().amax({2, 4}).clamp_min(1e-12) / limit;
        target_scale->index_copy_(1, to_pages, scale.to(target_scale->scalar_type()));
        pages = (pages / beside_pages(scale)).clamp(-limit, limit);
        if (to == at::kChar) pages = (pages + 0.5).floor();
    }
    write_listed(target, to_pages, pages);
}

// Norms and linear layers

void adaln(const Tensor& x, const Maybe& update, const Maybe& gate, const Maybe& shift, const Maybe& scale,
           const Maybe& weight, const Maybe& bias, const Tensor& residual, const Tensor& normed, const Maybe& row_scale,
           double eps) {
    const at::ScalarType wide = wide_of(x);
    auto tokens = [&](const Tensor& per_frame) {  // [R, F, d] to [R, T, d]
        return per_frame.to(wide).repeat_interleave(x.size(1) / per_frame.size(1), 1);
    };
    Tensor total = x.to(wide);
    if (update) total = total + (gate ? update->to(wide) * tokens(*gate) : update->to(wide));
    residual.copy_(total);
    Tensor result = at::layer_norm(total, {total.size(-1)}, {}, {}, eps);
    if (weight && bias) result = result * weight->to(wide) + bias->to(wide);
    if (shift && scale) result = result * (1 + tokens(*scale)) + tokens(*shift);
    if (row_scale) {
        const Tensor by = result.abs().amax(-1).clamp_min(1e-12) / limit_of(fp8);
        row_scale->copy_(by);
        result = result / by.unsqueeze(-1);
    }
    normed.copy_(result);
}

void gated_norm(const Tensor& x, const Tensor& update, const Tensor& gate, const Tensor& weight, const Tensor& bias,
                const Maybe& next_weight, const Maybe& next_bias, const Tensor& out, const Maybe& normed, double eps,
                double next_eps) {
    const at::ScalarType wide = wide_of(x);
    const Tensor gates = gate.to(wide).repeat_interleave(x.size(1) / gate.size(1), 1);
    const std::vector<int64_t> dim{x.size(-1)};
    const Tensor norm = at::layer_norm(update.to(wide) * gates, dim, weight.to(wide), bias.to(wide), eps);
    const Tensor total = x.to(wide) + norm;
    out.copy_(total);
    if (next_weight && next_bias && normed)
        normed->copy_(at::layer_norm(total, dim, next_weight->to(wide), next_bias->to(wide), next_eps));
}

void swiglu(const Tensor& x, const Tensor& out) {
    const Tensor wide = x.to(wide_of(x));
    const int64_t width = out.size(-1);
    out.copy_(at::silu(wide.narrow(1, 0, width)) * wide.narrow(1, width, width));
}

void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, double eps) {
    const Tensor wide = x.to(wide_of(x));
    out.copy_(wide * at::rsqrt(wide.square().mean(last, true) + eps) * weight.to(wide.scalar_type()));
}

// x with a bias and a residual added, in float32 or better.
Tensor sum_of(const Tensor& x, const Maybe& bias, const Maybe& residual) {
    Tensor total = x.to(wide_of(x));
    for (const Maybe& added : {bias, residual})
        if (added) total = total + added->to(total.scalar_type());
    return total;
}

void rms_silu(const Tensor& x, const Tensor& gamma, const Maybe& bias, const Maybe& residual, const Maybe& total,
              const Tensor& out, const Maybe& tail) {
    const Tensor sum = sum_of(x, bias, residual), size = sum.norm(2, last, true).clamp_min(1e-12);
    if (total) total->copy_(sum);
    out.copy_(at::silu(sum / size * std::sqrt(double(x.size(-1))) * gamma.to(sum.scalar_type())));
    if (tail) tail->copy_(out.narrow(0, out.size(0) - tail->size(0), tail->size(0)));
}

void conv_epilogue(const Tensor& x, const Maybe& bias, const Maybe& residual, const Tensor& out, int64_t parts,
                   bool relu) {
    const Tensor sum = sum_of(x, bias, residual), result = relu ? sum.relu() : sum;
    out.copy_(result.unflatten(-1, {parts, -1}).movedim(-2, 1).flatten(0, 1));
}

void join_phases(const Tensor& x, const Maybe& bias, const Tensor& out) {
    const int64_t rows = x.size(1) - 1, columns = x.size(2) - 1, channels = out.size(-1);
    for (int64_t number = 0; number < 4; ++number) {
        const int64_t down = number / 2, right = number % 2;
        const Tensor phase =
            x.narrow(1, down, rows).narrow(2, right, columns).narrow(3, number * channels, channels);
        out.slice(1, down, std::nullopt, 2).slice(2, right, std::nullopt, 2).copy_(sum_of(phase, bias, {}));
    }
}

void linear_lowp(const Tensor& x, const Tensor& weight, const Tensor& x_scale, const Tensor& weight_scale,
                 const Maybe& bias, const Tensor& out, bool gelu) {
    const at::ScalarType wide = wide_of(x_scale);
    Tensor result = x.to(wide).matmul(weight.to(wide).t()) * x_scale.to(wide).unsqueeze(-1) * weight_scale.to(wide);
    if (bias) result = result + bias->to(wide);
    out.copy_(gelu ? at::gelu(result, "tanh") : result);
}

void quantise_rows(const Tensor& x, const Tensor& out, const Tensor& scale, bool gelu) {
    const Tensor wide = gelu ? at::gelu(x.to(at::kFloat), "tanh") : x.to(at::kFloat);
    const double limit = limit_of(out.scalar_type());
    const Tensor by = wide.abs().amax(1).clamp_min(1e-12) / limit;
    const Tensor scaled = (wide / by.unsqueeze(-1)).clamp(-limit, limit);
    out.copy_(out.scalar_type() == at::kChar ? scaled.round() : scaled);
    scale.copy_(by);
}

void linear_wide(const Tensor& x, const Tensor& weight, const Tensor& out) {
    out.copy_(at::linear(x.to(out.scalar_type()), weight.to(out.scalar_type())));
}

void linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out) {
    out.copy_(at::gelu(at::linear(x, weight, bias), "tanh"));
}

// Noise and solver

// Normals [R, F, C, H, W] of each row's key and absolute frames.
Tensor noise_of(const Tensor& x, const Tensor& frames, const Tensor& key, int64_t draw, int64_t stream) {
    Tensor noise = at::empty(x.sizes(), at::kFloat);
    const Tensor whole = frames.to(at::kLong).contiguous();
    for (int64_t row = 0; row < x.size(0); ++row) {
        const std::span<const int64_t> of_row(whole[row].const_data_ptr<int64_t>(), size_t(whole.size(1)));
        const inferix::Shape shape = x.sizes().slice(2).vec();
        inferix::Tensor made = inferix::normals(uint64_t(key[row].item<int64_t>()), of_row, uint32_t(draw), shape,
                                                uint32_t(stream));
        noise[row].copy_(at::from_blob(made.data.data(), made.shape, at::kFloat));
    }
    return noise;
}

void frame_noise(const Tensor& frames, const Tensor& key, const Tensor& out, int64_t draw, int64_t stream) {
    out.copy_(noise_of(out, frames, key, draw, stream));
}

void denoise_step(const Tensor& tokens, const Tensor& x, const Tensor& frames, const Tensor& key,
                  const Tensor& coefficients, const Maybe& history, const Tensor& out, const Maybe& x0,
                  const Maybe& corrected, int64_t patch_height, int64_t patch_width, int64_t draw, int64_t stream) {
    const at::ScalarType wide = wide_of(x);
    const Tensor velocity = tokens.to(wide)
                                .unflatten(-1, {patch_height, patch_width, x.size(2)})
                                .unflatten(1, {x.size(1), x.size(3) / patch_height, x.size(4) / patch_width})
                                .permute({0, 1, 6, 2, 4, 3, 5})
                                .flatten(5, 6)
                                .flatten(3, 4);
    const Tensor weights = coefficients.to(wide), clean = x.to(wide) - weights[0][0] * velocity;
    std::vector<Tensor> terms{x.to(wide), clean, noise_of(x, frames, key, draw, stream).to(wide)};
    if (history)
        for (const Tensor& term : history->to(wide).unbind(0)) terms.push_back(term);
    for (const auto& [row, result] : {std::pair<int64_t, Maybe>(1, out), std::pair<int64_t, Maybe>(2, corrected)}) {
        if (!result) continue;
        Tensor total = at::zeros_like(clean);
        for (size_t term = 0; term < terms.size(); ++term) total = total + weights[row][int64_t(term)] * terms[term];
        result->copy_(total);
    }
    if (x0) x0->copy_(clean);
}

}  // namespace

TORCH_LIBRARY(inferix, library) {
    for (const char* schema : {
             "block_attention(Tensor q, Tensor kv, Tensor page_table, Tensor page_count, Tensor(a4!) out, "
             "Tensor? q_sink, Tensor? sink_count, Tensor? kv_scale, Tensor(a8!)? lse, float scale) -> ()",
             "attention_parts(Tensor q, Tensor kv, Tensor page_table, Tensor page_count, Tensor(a4!) out, "
             "Tensor(a5!) lse, Tensor? q_sink, Tensor? sink_count, Tensor? kv_scale, float scale) -> ()",
             "merge_parts(Tensor results, Tensor sums, Tensor(a2!) out, Tensor(a3!)? lse) -> ()",
             "qk_norm_rope_append(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor rope_time, Tensor rope_rows, "
             "Tensor rope_columns, Tensor(a6!) q, Tensor(a7!) kv, Tensor pages, Tensor? rope_sink, "
             "Tensor(a10!)? q_sink, Tensor? kv_scale, float eps) -> ()",
             "adaln(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, "
             "Tensor? bias, Tensor(a7!) residual, Tensor(a8!) normed, Tensor(a9!)? row_scale, float eps) -> ()",
             "denoise_step(Tensor tokens, Tensor x, Tensor frames, Tensor key, Tensor coefficients, Tensor? history, "
             "Tensor(a6!) out, Tensor(a7!)? x0, Tensor(a8!)? corrected, SymInt patch_height, SymInt patch_width, "
             "SymInt draw, SymInt stream) -> ()",
             "frame_noise(Tensor frames, Tensor key, Tensor(a2!) out, SymInt draw, SymInt stream) -> ()",
             "linear_lowp(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor(a5!) out, "
             "bool gelu) -> ()",
             "quantise_rows(Tensor x, Tensor(a1!) out, Tensor(a2!) scale, bool gelu) -> ()",
             "kv_pages(Tensor source, Tensor source_pages, Tensor(a2!) target, Tensor target_pages, "
             "Tensor? source_scale, Tensor(a5!)? target_scale) -> ()",
             "rms_norm(Tensor x, Tensor weight, Tensor(a2!) out, float eps) -> ()",
             "rms_silu(Tensor x, Tensor gamma, Tensor? bias, Tensor? residual, Tensor(a4!)? total, Tensor(a5!) out, "
             "Tensor(a6!)? tail) -> ()",
             "conv_epilogue(Tensor x, Tensor? bias, Tensor? residual, Tensor(a3!) out, SymInt parts, bool relu) -> ()",
             "gated_norm(Tensor x, Tensor update, Tensor gate, Tensor weight, Tensor bias, Tensor? next_weight, "
             "Tensor? next_bias, Tensor(a7!) out, Tensor(a8!)? normed, float eps, float next_eps) -> ()",
             "swiglu(Tensor x, Tensor(a1!) out) -> ()",
             "linear_wide(Tensor x, Tensor weight, Tensor(a2!) out) -> ()",
             "join_phases(Tensor x, Tensor? bias, Tensor(a2!) out) -> ()",
             "dense_attention(Tensor q, Tensor kv, SymInt first, SymInt count, Tensor(a4!) out, float scale) -> ()",
             "rope_append(Tensor q, Tensor k, Tensor v, Tensor rope_time, Tensor rope_rows, Tensor rope_columns, "
             "Tensor(a6!) out, Tensor(a7!) kv, Tensor pages, Tensor? rope_sink, Tensor(a10!)? q_sink, "
             "Tensor? kv_scale, bool half_split) -> ()",
             "linear_gelu(Tensor x, Tensor weight, Tensor bias, Tensor(a3!) out) -> ()",
             "all_to_all(Tensor x, Tensor(a1!) out, SymInt group) -> ()",
             "all_gather(Tensor x, Tensor(a1!) out, SymInt group) -> ()",
             "hand_over(Tensor x, Tensor(a1!) out, SymInt group) -> ()",
         })
        library.def(schema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(inferix, CPU, library) {
    library.impl("block_attention", &block_attention);
    library.impl("attention_parts", &attention_parts);
    library.impl("merge_parts", &merge_parts);
    library.impl("qk_norm_rope_append", &qk_norm_rope_append);
    library.impl("adaln", &adaln);
    library.impl("denoise_step", &denoise_step);
    library.impl("frame_noise", &frame_noise);
    library.impl("linear_lowp", &linear_lowp);
    library.impl("quantise_rows", &quantise_rows);
    library.impl("kv_pages", &kv_pages);
    library.impl("rms_norm", &rms_norm);
    library.impl("rms_silu", &rms_silu);
    library.impl("conv_epilogue", &conv_epilogue);
    library.impl("join_phases", &join_phases);
    library.impl("dense_attention", &dense_attention);
    library.impl("rope_append", &rope_append);
    library.impl("gated_norm", &gated_norm);
    library.impl("swiglu", &swiglu);
    library.impl("linear_wide", &linear_wide);
    library.impl("linear_gelu", &linear_gelu);
}
