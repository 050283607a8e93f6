//! Which learning rate and decay a parameter has: rules by pattern, the methods' own and the user's.

use std::collections::HashMap;

use peft_core::{Error, Param, ParamGroups, Result, nearest};
use regex::Regex;

use super::Rate;
use crate::config::TrainSection;

/// Factor on the learning rate and weight decay of each parameter.
#[derive(Clone, Debug)]
pub struct Groups {
    rules: Vec<Rule>,
    weight_decay: f64,
    found: HashMap<String, (f64, f64)>,
}

#[derive(Clone, Debug)]
struct Rule {
    pattern: Regex,
    factor: Option<f64>,
    weight_decay: Option<f64>,
}

impl Groups {
    /// Rules in the order of growing weight: the methods', then `train.lr_multipliers`. Of those that match a key, the
    /// last that says something about the rate, or about the decay, decides it.
    ///
    /// # Errors
    /// A pattern that is no regular expression, or one of the user's that matches no parameter, with the nearest keys.
    pub fn new(train: &TrainSection, methods: &ParamGroups, params: &[Param]) -> Result<Self> {
        let mut rules = Vec::new();
        for rule in &methods.rules {
            let pattern = compile("learning-rate rule of the method", &rule.pattern)?;
            rules.push(Rule {
                pattern,
                factor: Some(rule.learning_rate),
                weight_decay: rule.weight_decay,
            });
        }
        for (i, rule) in train.lr_multipliers.iter().enumerate() {
            let field = format!("train.lr_multipliers[{i}].pattern");
            let pattern = compile(&field, &rule.pattern)?;
            if !params.iter().any(|p| pattern.is_match(p.key())) {
                let close = nearest(&rule.pattern, params.iter().map(Param::key));
                let hint = if close.is_empty() {
                    String::new()
                } else {
                    format!("; nearest: {}", close.join(", "))
                };
                return Err(Error::config(
                    field,
                    format!("{:?} matches no trained parameter{hint}", rule.pattern),
                ));
            }
            let factor = match rule.learning_rate {
                // A base rate of 0 leaves nothing to be a multiple of.
                Some(_) if train.learning_rate == 0.0 => {
                    let detail = "needs a train.learning_rate above 0; give `multiplier` instead";
                    return Err(Error::config(
                        format!("train.lr_multipliers[{i}].learning_rate"),
                        detail,
                    ));
                }
                Some(rate) => Some(rate / train.learning_rate),
                None => rule.multiplier,
            };
            rules.push(Rule {
                pattern,
                factor,
                weight_decay: rule.weight_decay,
            });
        }
        Ok(Self {
            rules,
            weight_decay: train.weight_decay,
            found: HashMap::new(),
        })
    }

    /// The rate of a parameter where the run's is `learning_rate`.
    pub fn rate(&mut self, key: &str, learning_rate: f64) -> Rate {
        let (factor, weight_decay) = match self.found.get(key) {
            Some(&found) => found,
            None => {
                let matching = || {
                    self.rules
                        .iter()
                        .rev()
                        .filter(|rule| rule.pattern.is_match(key))
                };
                let factor = matching().find_map(|rule| rule.factor).unwrap_or(1.0);
                let decay = matching()
                    .find_map(|rule| rule.weight_decay)
                    .unwrap_or(self.weight_decay);
                self.found.insert(key.to_owned(), (factor, decay));
                (factor, decay)
            }
        };
        Rate {
            learning_rate: learning_rate * factor,
            weight_decay,
        }
    }
}

fn compile(field: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| {
        Error::config(
            field,
            format!("{pattern:?} is not a regular expression: {e}"),
        )
    })
}
