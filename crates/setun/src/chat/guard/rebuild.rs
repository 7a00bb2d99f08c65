//! The parsed template with its operations wrapped in calls that pay for them. Names that begin with `#` cannot be written in a
//! template, so it can neither call nor replace them.

use minijinja::Error;
use minijinja::machinery::ast::{
    AutoEscape, BinOp, BinOpKind, Call, CallArg, CallBlock, Compare, CompareOp, Do, EmitExpr, Expr, Filter,
    FilterBlock, ForLoop, GetAttr, GetItem, IfCond, IfExpr, List, Macro, Map, Set, SetBlock, Slice, Spanned,
    Stmt, Template, Test, Tuple, UnaryOp, UnaryOpKind, Var, WithBlock,
};
use minijinja::machinery::{Span, ast};
use minijinja::value::Value;

use super::refused;

/// Filters whose result is about as long as the text they are given; any other may take it apart into characters.
const TEXT_FILTERS: [&str; 18] = [
    "trim",
    "upper",
    "lower",
    "title",
    "capitalize",
    "replace",
    "indent",
    "format",
    "string",
    "tojson",
    "length",
    "count",
    "default",
    "d",
    "safe",
    "int",
    "float",
    "join",
];

/// The template with every operation paid for.
///
/// # Errors
/// For what reaches other templates, and for a block passed through a filter that is no text filter.
pub(in crate::chat) fn rebuild<'a>(template: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    statement(template)
}

fn at<T>(node: T, span: Span) -> Spanned<T> {
    Spanned::new(node, span)
}

fn call<'a>(name: &'static str, args: Vec<Expr<'a>>, span: Span) -> Expr<'a> {
    let expr = Expr::Var(at(Var { id: name }, span));
    Expr::Call(at(Call { expr, args: args.into_iter().map(CallArg::Pos).collect() }, span))
}

fn statements<'a>(all: &[Stmt<'a>]) -> Result<Vec<Stmt<'a>>, Error> {
    all.iter().map(statement).collect()
}

fn statement<'a>(stmt: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    Ok(match stmt {
        Stmt::Template(s) => Stmt::Template(at(Template { children: statements(&s.children)? }, s.span())),
        Stmt::EmitExpr(s) => Stmt::EmitExpr(at(EmitExpr { expr: expression(&s.expr)? }, s.span())),
        Stmt::EmitRaw(s) => {
            let value = Value::from_safe_string(s.raw.to_owned());
            Stmt::EmitExpr(at(EmitExpr { expr: Expr::Const(at(ast::Const { value }, s.span())) }, s.span()))
        }
        Stmt::ForLoop(s) => Stmt::ForLoop(at(
            ForLoop {
                target: target(&s.target)?,
                iter: call("#peek", vec![expression(&s.iter)?], s.iter.span()),
                filter_expr: optional(&s.filter_expr)?,
                recursive: s.recursive,
                body: statements(&s.body)?,
                else_body: statements(&s.else_body)?,
            },
            s.span(),
        )),
        Stmt::IfCond(s) => Stmt::IfCond(at(
            IfCond {
                expr: expression(&s.expr)?,
                true_body: statements(&s.true_body)?,
                false_body: statements(&s.false_body)?,
            },
            s.span(),
        )),
        Stmt::WithBlock(s) => {
            let assignment = |(to, value): &(Expr<'a>, Expr<'a>)| Ok((target(to)?, expression(value)?));
            let assignments = s.assignments.iter().map(assignment).collect::<Result<_, Error>>()?;
            Stmt::WithBlock(at(WithBlock { assignments, body: statements(&s.body)? }, s.span()))
        }
        Stmt::Set(s) => {
            Stmt::Set(at(Set { target: target(&s.target)?, expr: expression(&s.expr)? }, s.span()))
        }
        Stmt::SetBlock(s) => Stmt::SetBlock(at(
            SetBlock { target: target(&s.target)?, filter: optional(&s.filter)?, body: statements(&s.body)? },
            s.span(),
        )),
        Stmt::AutoEscape(s) => Stmt::AutoEscape(at(
            AutoEscape { enabled: expression(&s.enabled)?, body: statements(&s.body)? },
            s.span(),
        )),
        Stmt::FilterBlock(s) => Stmt::FilterBlock(at(
            FilterBlock { filter: expression(&s.filter)?, body: statements(&s.body)? },
            s.span(),
        )),
        Stmt::Macro(s) => Stmt::Macro(at(macro_of(s)?, s.span())),
        Stmt::CallBlock(s) => Stmt::CallBlock(at(
            CallBlock {
                call: at(call_of(&s.call)?, s.call.span()),
                macro_decl: at(macro_of(&s.macro_decl)?, s.macro_decl.span()),
            },
            s.span(),
        )),
        Stmt::Do(s) => Stmt::Do(at(Do { call: at(call_of(&s.call)?, s.call.span()) }, s.span())),
        Stmt::Continue(s) => Stmt::Continue(at(ast::Continue, s.span())),
        Stmt::Break(s) => Stmt::Break(at(ast::Break, s.span())),
        Stmt::Block(_) | Stmt::Import(_) | Stmt::FromImport(_) | Stmt::Extends(_) | Stmt::Include(_) => {
            return Err(refused("blocks and other templates cannot be used in a chat template"));
        }
    })
}

fn macro_of<'a>(m: &Macro<'a>) -> Result<Macro<'a>, Error> {
    Ok(Macro {
        name: m.name,
        args: m.args.iter().map(target).collect::<Result<_, _>>()?,
        defaults: expressions(&m.defaults)?,
        body: statements(&m.body)?,
    })
}

/// What is assigned to stays as it is.
fn target<'a>(expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
    Ok(match expr {
        Expr::Var(e) => Expr::Var(at(Var { id: e.id }, e.span())),
        Expr::GetAttr(e) => Expr::GetAttr(at(GetAttr { expr: target(&e.expr)?, name: e.name }, e.span())),
        Expr::List(e) => {
            let items = e.items.iter().map(target).collect::<Result<_, _>>()?;
            Expr::List(at(List { items }, e.span()))
        }
        _ => return Err(refused("this cannot be assigned to")),
    })
}

fn expressions<'a>(all: &[Expr<'a>]) -> Result<Vec<Expr<'a>>, Error> {
    all.iter().map(expression).collect()
}

fn optional<'a>(expr: &Option<Expr<'a>>) -> Result<Option<Expr<'a>>, Error> {
    expr.as_ref().map(expression).transpose()
}

/// An operand that is read through; constants are as long as the template at most.
fn looked<'a>(how: &'static str, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
    Ok(match expr {
        Expr::Const(_) => expression(expr)?,
        _ => call(how, vec![expression(expr)?], expr.span()),
    })
}

/// An operand that the compiler does not try to compute: it would try again at every level of a nesting.
fn unfolded<'a>(expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
    let (inner, span) = (expression(expr)?, expr.span());
    Ok(match inner {
        Expr::UnaryOp(_) | Expr::BinOp(_) => {
            let test_expr = Expr::Const(at(ast::Const { value: Value::from(true) }, span));
            Expr::IfExpr(at(IfExpr { test_expr, true_expr: inner, false_expr: None }, span))
        }
        other => other,
    })
}

fn expression<'a>(expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
    let span = expr.span();
    let kept = |expr| call("#keep", vec![expr], span);
    Ok(match expr {
        Expr::Var(e) => Expr::Var(at(Var { id: e.id }, span)),
        Expr::Const(e) => Expr::Const(at(ast::Const { value: e.value.clone() }, span)),
        Expr::Slice(e) => {
            let sliced = looked("#peek", &e.expr)?;
            let [start, stop, step] = [&e.start, &e.stop, &e.step].map(optional);
            let (start, stop, step) = (start?, stop?, step?);
            // The engine (3.0.5) panics on empty text taken backwards, so steps are taken by a function of our own.
            let Some(step) = step else {
                return Ok(kept(Expr::Slice(at(Slice { expr: sliced, start, stop, step }, span))));
            };
            let or_none = |bound: Option<Expr<'a>>| {
                bound.unwrap_or_else(|| Expr::Const(at(ast::Const { value: Value::from(()) }, span)))
            };
            kept(call("#slice", vec![sliced, or_none(start), or_none(stop), step], span))
        }
        Expr::UnaryOp(e) => {
            // The type is not `Copy`.
            let negates = matches!(e.op, UnaryOpKind::Neg);
            let op = if negates { UnaryOpKind::Neg } else { UnaryOpKind::Not };
            Expr::UnaryOp(at(UnaryOp { op, expr: unfolded(&e.expr)? }, span))
        }
        Expr::BinOp(e) => {
            let paid = match e.op {
                BinOpKind::Concat => Some("#concat"),
                BinOpKind::Add => Some("#add"),
                BinOpKind::Mul => Some("#mul"),
                _ => None,
            };
            if let Some(name) = paid {
                return Ok(call(name, vec![expression(&e.left)?, expression(&e.right)?], span));
            }
            let reads = matches!(
                e.op,
                BinOpKind::Eq
                    | BinOpKind::Ne
                    | BinOpKind::Lt
                    | BinOpKind::Lte
                    | BinOpKind::Gt
                    | BinOpKind::Gte
                    | BinOpKind::In
            );
            let side = |expr| if reads { looked("#look", expr) } else { unfolded(expr) };
            Expr::BinOp(at(BinOp { op: e.op, left: side(&e.left)?, right: side(&e.right)? }, span))
        }
        Expr::Compare(e) => {
            let with = |c: &CompareOp<'a>| Ok(CompareOp { op: c.op, expr: looked("#look", &c.expr)? });
            let ops = e.ops.iter().map(with).collect::<Result<_, Error>>()?;
            Expr::Compare(at(Compare { expr: looked("#look", &e.expr)?, ops }, span))
        }
        Expr::IfExpr(e) => Expr::IfExpr(at(
            IfExpr {
                test_expr: expression(&e.test_expr)?,
                true_expr: expression(&e.true_expr)?,
                false_expr: optional(&e.false_expr)?,
            },
            span,
        )),
        Expr::Filter(e) => {
            let text = TEXT_FILTERS.contains(&e.name);
            let inner = match &e.expr {
                Some(inner) if text => Some(looked("#look", inner)?),
                Some(inner) if e.name == "map" => Some(looked("#burst", inner)?),
                Some(inner) => Some(looked("#spread", inner)?),
                None if text => None,
                None => {
                    let what = format!("a block of text cannot be passed through the filter `{}`", e.name);
                    return Err(refused(what));
                }
            };
            kept(Expr::Filter(at(Filter { name: e.name, expr: inner, args: arguments(&e.args)? }, span)))
        }
        Expr::Test(e) => {
            let args = arguments(&e.args)?;
            Expr::Test(at(Test { name: e.name, expr: looked("#look", &e.expr)?, args }, span))
        }
        Expr::GetAttr(e) => Expr::GetAttr(at(GetAttr { expr: expression(&e.expr)?, name: e.name }, span)),
        Expr::GetItem(e) => Expr::GetItem(at(
            GetItem { expr: looked("#peek", &e.expr)?, subscript_expr: expression(&e.subscript_expr)? },
            span,
        )),
        Expr::Call(e) => kept(Expr::Call(at(call_of(e)?, span))),
        Expr::List(e) => kept(Expr::List(at(List { items: expressions(&e.items)? }, span))),
        Expr::Tuple(e) => kept(Expr::Tuple(at(Tuple { items: expressions(&e.items)? }, span))),
        Expr::Map(e) => {
            let map = Map { keys: expressions(&e.keys)?, values: expressions(&e.values)? };
            kept(Expr::Map(at(map, span)))
        }
    })
}

/// A call; of a method, the receiver is read.
fn call_of<'a>(c: &Call<'a>) -> Result<Call<'a>, Error> {
    let expr = match &c.expr {
        Expr::GetAttr(method) => {
            let receiver = match &method.expr {
                // `self` and `loop` are no values of the template's own.
                Expr::Var(v) if matches!(v.id, "self" | "loop") => expression(&method.expr)?,
                other => looked("#peek", other)?,
            };
            Expr::GetAttr(at(GetAttr { expr: receiver, name: method.name }, method.span()))
        }
        other => expression(other)?,
    };
    Ok(Call { expr, args: arguments(&c.args)? })
}

fn arguments<'a>(args: &[CallArg<'a>]) -> Result<Vec<CallArg<'a>>, Error> {
    let one = |arg: &CallArg<'a>| {
        Ok(match arg {
            CallArg::Pos(e) => CallArg::Pos(expression(e)?),
            CallArg::Kwarg(name, e) => CallArg::Kwarg(name, expression(e)?),
            CallArg::PosSplat(e) => CallArg::PosSplat(expression(e)?),
            CallArg::KwargSplat(e) => CallArg::KwargSplat(expression(e)?),
        })
    };
    args.iter().map(one).collect()
}
